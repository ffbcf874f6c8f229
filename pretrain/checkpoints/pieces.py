"""What a rank keeps of a DeepSpeed engine, as views with the places they have in whole parameters.

ZeRO cuts masters and optimizer states where the number of ranks says, each level in a way of its own. Here
every cut becomes a piece of a parameter: written by one number of ranks, it can be read by another, at
another level. DeepSpeed's own checkpoints can be turned into such ("universal") ones by a conversion that
copies them, leaves frozen parameters out and reads pickles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from pretrain.config import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
MOMENTUM = "momentum_buffer"  # of Muon


@dataclass(frozen=True)
class Piece:
    """A part of a whole tensor that this rank keeps."""

    kind: str  # `weight`, `buffer`, or what the optimizer calls its state
    name: str  # of the parameter or buffer
    start: int  # place of its first element in the flattened whole
    tensor: Tensor  # a view: writing into it changes the engine

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class _Kept:
    """Where the optimizer keeps this rank's part of a trained parameter."""

    name: str
    start: int
    numel: int
    flat: Tensor  # masters of many parameters; the key of the optimizer's state
    offset: int  # in `flat`


def own_pieces(engine: DeepSpeedEngine) -> list[Piece]:
    """What this rank alone, or it among few, keeps: fp32 masters, optimizer states, shards of frozen parts.

    Raises:
        ConfigError: the optimizer's state is on NVMe.
    """
    zero, pieces = _zero(engine), []
    for kept in _kept(engine):
        pieces.append(_cut("weight", kept, kept.flat))
        state = zero.optimizer.state.get(kept.flat, {})
        kinds = MOMENTS if _keeps_whole_momentum(engine) else (*MOMENTS, MOMENTUM)
        pieces += [_cut(kind, kept, state[kind]) for kind in kinds if kind in state]
    pieces += _whole_momentum(engine)
    if engine.zero_optimization_stage() == 3:
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                start, numel = _shard(zero, parameter)
                if numel > 0:
                    pieces.append(Piece("weight", name, start, parameter.ds_tensor.data[:numel]))
    return pieces


def shared_pieces(engine: DeepSpeedEngine) -> list[Piece]:
    """What every rank keeps whole: buffers and, below ZeRO-3, frozen parameters."""
    module = engine.module
    persistent = module.state_dict(keep_vars=True).keys()
    pieces = [
        Piece("buffer", name, 0, buffer.data)
        for name, buffer in module.named_buffers()
        if name in persistent and buffer.numel()
    ]
    if engine.zero_optimization_stage() < 3:
        pieces += [
            Piece("weight", name, 0, parameter.data)
            for name, parameter in module.named_parameters()
            if not parameter.requires_grad and parameter.numel()
        ]
    return pieces


def contents(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Names, shapes and types of what the engine holds, whatever the number of ranks; plain values."""
    module = engine.module
    named = dict(module.named_parameters())
    parameters = {
        name: {
            "shape": list(getattr(parameter, "ds_shape", parameter.shape)),
            "trained": parameter.requires_grad,
            "dtype": str(torch.float32 if parameter.requires_grad else parameter.dtype)[6:],
        }
        for name, parameter in named.items()
    }
    persistent = module.state_dict(keep_vars=True)
    buffers = {
        name: {"shape": list(buffer.shape), "dtype": str(buffer.dtype)[6:]}
        for name, buffer in module.named_buffers()
        if name in persistent
    }
    names = {id(parameter): name for name, parameter in named.items()}
    every = module.named_parameters(remove_duplicate=False)
    aliases = {name: names[id(parameter)] for name, parameter in every if name not in named}
    return {"parameters": parameters, "buffers": buffers, "aliases": aliases}


def counters(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Numbers of the engine that go on where they were: steps, schedule, AdamW's own count."""
    states = _zero(engine).optimizer.state.values()
    adam = {float(state["step"]) for state in states if "step" in state}
    if len(adam) > 1:
        raise AssertionError(f"AdamW counts {sorted(adam)} steps in groups of one engine")
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "schedule": engine.lr_scheduler.state_dict(),
        "adam_steps": max(adam, default=0.0),
    }


def prepare_loading(engine: DeepSpeedEngine, kinds: set[str], adam_steps: float) -> None:
    """Partition parameters, and make the optimizer states that the first step would make.

    Args:
        engine: before its first step.
        kinds: of states that will be loaded.
        adam_steps: AdamW's count of steps.
    """
    zero = _zero(engine)
    if engine.zero_optimization_stage() == 3:
        zero.checkpoint_event_prologue()
    for index, (flat, uses_muon) in enumerate(_groups(engine)):
        state = zero.optimizer.state[flat]  # a defaultdict
        if not uses_muon and kinds & set(MOMENTS):
            state["step"] = torch.tensor(adam_steps, dtype=torch.float32, device=flat.device)  # as if fused
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(flat)
        if uses_muon and MOMENTUM in kinds and MOMENTUM not in state:
            whole = _keeps_whole_momentum(engine)
            numel = sum(p.numel() for p in zero.params_in_partition[index]) if whole else flat.numel()
            state[MOMENTUM] = torch.zeros(numel, dtype=torch.float32, device=flat.device)


def finish_loading(engine: DeepSpeedEngine, saved: dict[str, Any]) -> None:
    """Make the parameters that modules compute with from the masters; take over `counters`."""
    zero = _zero(engine)
    if engine.zero_optimization_stage() == 3:
        for index in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        zero.checkpoint_event_epilogue()
    else:
        zero.update_lp_params()
    engine.global_steps = saved["global_steps"]
    engine.global_samples = saved["global_samples"]
    engine.skipped_steps = saved["skipped_steps"]
    engine.lr_scheduler.load_state_dict(saved["schedule"])


def _zero(engine: DeepSpeedEngine) -> Any:
    zero = engine.optimizer
    if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
        raise ConfigError(
            "checkpoints of states offloaded to NVMe are not supported: set the device of offload_optimizer "
            "and offload_param to cpu in the DeepSpeed file"
        )
    return zero


def _groups(engine: DeepSpeedEngine) -> list[tuple[Tensor, bool]]:
    """Flat masters of this rank, and whether Muon moves them."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        flats = zero.fp32_partitioned_groups_flat
        muon = zero.sub_groups_using_muon if zero.use_muon else [False] * len(flats)
        return list(zip(flats, muon, strict=True))
    groups = zero.optimizer.param_groups
    return [(group["params"][0], group.get("use_muon", False)) for group in groups]


def _kept(engine: DeepSpeedEngine) -> Iterator[_Kept]:
    """This rank's parts of trained parameters."""
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() == 3:
            if parameter.ds_numel == 0:
                continue
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            start, numel = _shard(zero, parameter)
            if numel > 0:
                yield _Kept(name, start, numel, zero.fp32_partitioned_groups_flat[group], offset)
        elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            master = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
            yield _Kept(name, whole.start, whole.numel, master, flat.start)


def _shard(zero: Any, parameter: Any) -> tuple[int, int]:
    """Place and number of elements of this rank's part under ZeRO-3, without the padding at the end."""
    size = parameter.partition_numel()
    start = size * zero._get_param_partition_rank(parameter)
    return start, min(size, parameter.ds_numel - start)


def _cut(kind: str, kept: _Kept, flat: Tensor) -> Piece:
    return Piece(kind, kept.name, kept.start, flat.data.view(-1)[kept.offset : kept.offset + kept.numel])


def _keeps_whole_momentum(engine: DeepSpeedEngine) -> bool:
    """Whether DeepSpeed keeps Muon's momentum of every matrix that this rank has a part of, whole.

    ZeRO-1 and 2 orthogonalize whole matrices on every rank that has a part; their bf16 relative, ZeRO-3 and
    offloading exchange the parts instead.
    """
    zero = engine.optimizer
    return (
        engine.zero_optimization_stage() < 3 and hasattr(zero, "params_in_partition") and not zero.cpu_offload
    )


def _whole_momentum(engine: DeepSpeedEngine) -> Iterator[Piece]:
    if not _keeps_whole_momentum(engine):
        return
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for index, (flat, uses_muon) in enumerate(_groups(engine)):
        if not uses_muon or MOMENTUM not in zero.optimizer.state.get(flat, {}):
            continue
        offset, momentum = 0, zero.optimizer.state[flat][MOMENTUM]
        for parameter in zero.params_in_partition[index]:
            numel = parameter.numel()
            yield Piece(MOMENTUM, names[id(parameter)], 0, momentum[offset : offset + numel])
            offset += numel
