"""Parameter groups of AdamW and Muon, and the learning-rate schedule, a pure function of the step."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError, OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by optimizer, learning rate and weight decay (none for those of one dimension).

    Frozen parameters are in no group and get no optimizer state.

    Raises:
        ConfigError: nothing is trainable, or a pattern of `lr_scales` fits no parameter, not a frozen one.
    """
    groups: dict[tuple[bool, float, float], dict[str, Any]] = {}
    unused = {pattern for pattern in config.lr_scales if not _of_absent_part(pattern, model)}
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in config.lr_scales if fnmatch.fnmatchcase(name, pattern)), None)
        unused.discard(pattern)
        if not parameter.requires_grad:
            continue
        scale = 1.0 if pattern is None else config.lr_scales[pattern]
        # Under ZeRO-3 construction a parameter is an empty placeholder; its true shape is in ds_shape.
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        decay = config.weight_decay if is_matrix else 0.0
        excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in config.muon_exclude)
        parameter.use_muon = config.name == "muon" and is_matrix and not excluded  # DeepSpeed reads this
        empty = {"params": [], "weight_decay": decay, "lr_scale": scale, "use_muon": parameter.use_muon}
        groups.setdefault((parameter.use_muon, scale, decay), empty)["params"].append(parameter)
    if not groups:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: every part of it is frozen")
    if unused:
        raise ConfigError(f"lr_scales: no parameter's name fits {', '.join(sorted(unused))}")
    return list(groups.values())


def freeze_parameters(model: nn.Module, patterns: list[str]) -> None:
    """Freeze every parameter whose name matches one of the patterns (`*` matches anything).

    So that a recipe fits every kind of unified model, patterns of parts that this one lacks count for
    nothing.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern) and not _of_absent_part(pattern, model):
            raise ConfigError(f"frozen: {pattern!r} matches no parameter; names look like {names[0]!r}")
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def _of_absent_part(pattern: str, model: nn.Module) -> bool:
    """Whether a pattern is of parts that models of this class may have and this one does not."""
    named = fnmatch.filter(getattr(model, "part_names", ()), pattern.partition(".")[0])
    return bool(named) and not any(name in model.parts() for name in named)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for matrices and AdamW for the rest, over the trainable parameters.

    AdamW is fused, because ZeRO hands it one flat tensor per group. Muon is DeepSpeed's, whose ZeRO levels
    orthogonalize whole matrices although each rank keeps a part of them.
    """
    groups = parameter_groups(model, config)
    settings = {"betas": tuple(config.betas), "eps": config.eps, "fused": True}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, **settings)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    _adapt_muon(next(p.dtype for p in model.parameters() if p.requires_grad))
    return MuonWithAuxAdam(groups, torch.optim.AdamW, settings)


def _adapt_muon(dtype: torch.dtype) -> None:
    """Make DeepSpeed's Muon see a kernel `[out, in, h, w]` as a matrix, and iterate in fp32 in fp32 runs.

    DeepSpeed 0.19.8 flattens a kernel halfway only: its last line broadcasts the two-dimensional update
    against the four-dimensional gradient. Its Newton-Schulz iteration runs in fp16 wherever the hardware has
    it, some CPUs too, so that what a run in fp32 learns would depend on the machine.
    """
    from deepspeed.runtime.zero.muon import original_muon

    if not hasattr(original_muon.ns_compute_dtype, "deepspeeds"):
        deepspeeds, update_of_matrix = original_muon.ns_compute_dtype, original_muon.muon_update

        def ns_compute_dtype(ns_method: str = "gram") -> torch.dtype:
            return torch.float32 if ns_compute_dtype.run_dtype == torch.float32 else deepspeeds(ns_method)

        def muon_update(grad: Tensor, momentum: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if grad.ndim != 4:
                return update_of_matrix(grad, momentum, *args, **kwargs)
            update = update_of_matrix(grad.flatten(1), momentum.view(len(grad), -1), *args, **kwargs)
            return update.reshape(grad.shape)

        ns_compute_dtype.deepspeeds = deepspeeds
        original_muon.ns_compute_dtype, original_muon.muon_update = ns_compute_dtype, muon_update
    original_muon.ns_compute_dtype.run_dtype = dtype


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) uses."""
    warmup = config.warmup_steps or round(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    span = max(1, total_steps - warmup)
    done = min(1.0, (step - warmup) / span)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


class LearningRateSchedule:
    """Sets the learning rate of every step; what DeepSpeed calls an lr_scheduler.

    Only the step is saved: rates, betas and decay come from the recipe, so that a recipe changed before a
    resume takes effect. `apply` has to be called after a checkpoint has been loaded, because the optimizer's
    own state brings the old values back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int) -> None:
        self.optimizer = optimizer
        self.config = config
        self.total_steps = total_steps
        self.steps_taken = 0
        names = ("use_muon", "lr_scale", "weight_decay")
        self.groups = [tuple(group[name] for name in names) for group in optimizer.param_groups]
        self.apply()

    def apply(self) -> None:
        """Write this step's learning rate and the recipe's settings into the optimizer."""
        factor = learning_rate_factor(self.steps_taken, self.config, self.total_steps)
        groups = zip(self.optimizer.param_groups, self.groups, strict=True)
        for group, (use_muon, scale, weight_decay) in groups:
            group["weight_decay"] = weight_decay
            if use_muon:
                group["lr"] = self.config.muon_lr * scale * factor
                group["momentum"] = self.config.muon_momentum
            else:
                group["lr"] = self.config.lr * scale * factor
                group["betas"] = tuple(self.config.betas)
                group["eps"] = self.config.eps

    def step(self) -> None:
        """Go on by one optimizer step; DeepSpeed does not call it for a step that it skipped."""
        self.steps_taken += 1
        self.apply()

    def get_lr(self) -> list[float]:
        """Learning rate of each group for the next step."""
        return [group["lr"] for group in self.optimizer.param_groups]

    get_last_lr = get_lr

    def state_dict(self) -> dict[str, int]:
        """The step."""
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over the step."""
        self.steps_taken = state["steps_taken"]
        self.apply()
