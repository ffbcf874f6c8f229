"""Backward passes and the optimizer step of a task's engines: all of them move, or none does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from pretrain.metrics import Averages

# What engines' marks and the flags of ranks are called among a step's figures.
_GRADIENTS, _FLAGS = "gradients/", "flags/"


class NotFiniteError(RuntimeError):
    """A step that was not taken: a loss or a gradient was not finite on some rank. Every rank raises it.

    Attributes:
        figures: of the step, averaged over ranks.
        losses: names of this rank's losses that are not finite.
        parameters: names of this rank's parameters whose gradients are not finite, before any reduction.
        micro_batches: places of this rank's micro-batches in which one of them arose.
        moved: engines that had moved before another one was found to have no finite norm.
    """

    def __init__(
        self,
        figures: dict[str, Any],
        losses: list[str],
        parameters: list[str],
        micro_batches: list[int],
        moved: list[str],
    ) -> None:
        super().__init__("a loss or a gradient is not finite")
        self.figures, self.losses, self.parameters = figures, losses, parameters
        self.micro_batches, self.moved = micro_batches, moved


class GradientMarks:
    """Notes, on the device, whether each gradient is finite as the backward pass makes it.

    ZeRO adds gradients up over ranks as they come, after which nobody can tell where a NaN arose. The sum of
    a gradient costs one reading of it and no wait; it is looked at where a step waits anyhow.

    Args:
        module: its trainable parameters are watched.
        micro_steps: backward passes in an optimizer step.
        device: of the gradients.
    """

    def __init__(self, module: nn.Module, micro_steps: int, device: torch.device) -> None:
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.losses = torch.zeros(micro_steps, device=device)
        self.sums = torch.zeros(micro_steps, len(trained), device=device)
        self.micro_step = 0
        for index, (_, parameter) in enumerate(trained):
            parameter.register_hook(partial(self._note, index))

    def _note(self, index: int, gradient: Tensor) -> None:
        self.sums[self.micro_step, index] = gradient.sum(dtype=torch.float32)

    def end_micro_batch(self, loss: Tensor) -> None:
        """Note the loss that a backward pass started from."""
        self.losses[self.micro_step] = loss.detach()
        self.micro_step += 1

    def total(self) -> Tensor:
        """0 if all gradients of the step so far are finite, else NaN; a scalar."""
        return (self.sums * 0).sum()

    def not_finite(self) -> tuple[list[str], list[int]]:
        """Names of parameters and places of micro-batches that are not finite here; waits for the device."""
        bad = ~self.sums.isfinite()
        micro_batches = (bad.any(1) | ~self.losses.isfinite()).nonzero().flatten().tolist()
        return [self.names[index] for index in bad.any(0).nonzero().flatten().tolist()], micro_batches

    def clear(self) -> None:
        """Forget the step."""
        self.losses.zero_()
        self.sums.zero_()
        self.micro_step = 0


def backward(engine: DeepSpeedEngine, loss: Tensor, reduction: Literal["mean", "sum"] = "mean") -> None:
    """Backward of one micro-batch's loss; `take_step` follows the last one's.

    DeepSpeed averages gradients over ranks and, unless told otherwise, over micro-batches.

    Args:
        engine: The engine whose forward made the loss; called once for each of the step's micro-batches.
        loss: Scalar.
        reduction: What is minimised over all ranks and micro-batches of the step: the `mean` of their losses,
            or the `sum`, for losses that the task has already divided by a global count.
    """
    with engine.clock.part("backward"):
        if reduction == "sum":
            engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
        else:
            engine.backward(loss)
    engine.marks.end_micro_batch(loss)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # counts the micro-batch


def take_step(engines: Mapping[str, DeepSpeedEngine], averages: Averages) -> dict[str, Any]:
    """The optimizer step of all engines, if all losses and gradients of all ranks are finite.

    Whether they are, and the flags of all ranks (`RankFlags`), travel with the step's figures, in the one
    collective and wait that these take. DeepSpeed waits in the same place, for the norm of the gradients;
    what it gives the device to do after that, optimizer and gathering of parameters, nobody waits for.

    Args:
        engines: By name; each has had its backward passes.
        averages: Figures of the step; those with `loss` in their names have to be finite.

    Returns:
        The figures, averaged over all ranks.

    Raises:
        NotFiniteError: They are not. No engine has moved, and no gradient is left; DeepSpeed counts a skipped
            step for each.
    """
    for name, engine in engines.items():
        averages.add(_GRADIENTS + name, engine.marks.total())
    flags, clock = next((engine.flags, engine.clock) for engine in engines.values())
    for name, holds in flags.ask.items():
        averages.add(_FLAGS + name, float(holds()))
    with clock.part("ranks"):
        figures = averages.reduce()
    flags.on_any = {name: figures[_FLAGS + name] > 0 for name in flags.ask}
    figures = {name: v for name, v in figures.items() if not name.startswith((_GRADIENTS, _FLAGS))}
    broken = any("loss" in name or name.startswith(_GRADIENTS) for name in averages.not_finite)
    moved: list[str] = []
    with clock.part("optimizer"):
        for name, engine in engines.items():
            if not broken:
                engine.step()
                # Finite gradients may still have a sum over ranks, or a norm, that is not.
                broken = not engine.was_step_applied()
                if not broken:
                    moved.append(name)
            else:
                _drop_step(engine)
    found = [engine.marks.not_finite() for engine in engines.values()] if broken else []
    for engine in engines.values():
        engine.marks.clear()
    if not broken:
        return figures
    several = len(engines) > 1
    parameters = [
        f"{name}: {parameter}" if several else parameter
        for name, (parameters, _) in zip(engines, found, strict=True)
        for parameter in parameters
    ]
    losses = [
        name for name, total in averages.sums.items() if "loss" in name and not math.isfinite(float(total))
    ]
    raise NotFiniteError(figures, losses, parameters, sorted({p for _, ps in found for p in ps}), moved)


def _drop_step(engine: DeepSpeedEngine) -> None:
    """Let DeepSpeed skip the step, as it does one whose norm is not finite: gradients go, counters go on.

    It has no call for that, and setting a gradient to NaN (`safe_set_full_grad`) is without effect in 0.19.8
    under ZeRO-1 in bf16 and under offload. So each optimizer is told a norm in the place where it asks.
    """
    zero = engine.optimizer
    answer: Any
    if isinstance(zero, BF16_Optimizer):
        place, answer = "get_grads_for_norm", ([torch.full((1,), torch.nan, device=engine.device)], [])
    elif hasattr(zero, "scaled_global_norm"):  # ZeRO-1 and 2
        place, answer = "scaled_global_norm", math.inf
    else:  # ZeRO-3: before Muon's momentum takes the gradients in
        place, answer = "_overflow_check_and_loss_scale_update", True

    def told(*_arguments: Any, **_options: Any) -> Any:
        zero.overflow = True
        return answer

    setattr(zero, place, told)
    try:
        engine.step()
    finally:
        delattr(zero, place)
    if engine.was_step_applied():
        raise RuntimeError(f"DeepSpeed took a step that was not to be taken ({type(zero).__name__})")
