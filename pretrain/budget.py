"""Bytes of a training step: what a rank holds and sends at each ZeRO level (arXiv 1910.02054).

What holds for the settings in `ds_configs/` and DeepSpeed 0.19.8, which differs from the paper: gradients are
added up and reduced in fp32, and ZeRO-1 in bf16 keeps them whole. `tests/test_pretrain/test_budget.py`
compares with engines on two ranks.

Letters: N parameters, T trained ones, M those of Muon; n ranks, w bytes of a weight (2 in bf16, 4 in fp32).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

LEVELS = (1, 2, 3)
FP32 = 4
WHOLE_REDUCTION = 500_000_000  # elements that DeepSpeed's ZeRO-1 in bf16 copies together to reduce them


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a part or a model."""

    total: int
    trained: int
    muon: int = 0  # of the trained ones, those in matrices that Muon takes

    def __add__(self, other: ParameterCount) -> ParameterCount:
        return ParameterCount(self.total + other.total, self.trained + other.trained, self.muon + other.muon)


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that a rank holds, at the moment it holds most."""

    parameters: float = 0.0
    gradients: float = 0.0
    masters: float = 0.0  # fp32 copies that the optimizer moves
    optimizer: float = 0.0
    buffers: float = 0.0  # of the reductions, and weights gathered by ZeRO-3
    fixed: float = 0.0  # networks that do not learn, outside the engine
    activations: float = 0.0
    logits: float = 0.0  # of a chunk, and gradients made in the forward pass
    host: float = 0.0  # offloaded to the machine's memory; no part of the total

    def __add__(self, other: HeldBytes) -> HeldBytes:
        return HeldBytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> float:
        """All that lies on the GPU."""
        return sum(getattr(self, f.name) for f in fields(self)) - self.host


def state_bytes(
    level: int, ranks: int, count: ParameterCount, weight: int, zero: dict[str, Any]
) -> HeldBytes:
    """Bytes of parameters, gradients, masters, optimizer states and buffers of an engine on a rank.

    Args:
        level: ZeRO level.
        ranks: n.
        count: of the engine's model.
        weight: w.
        zero: `zero_optimization` of the DeepSpeed file.
    """
    total, trained, muon = count.total, count.trained, count.muon
    masters = FP32 * trained / ranks
    optimizer = FP32 * (2 * (trained - muon) + muon) / ranks
    bucket = zero.get("reduce_bucket_size", WHOLE_REDUCTION)
    if level == 1:
        # In bf16 the sums are whole in fp32 beside the last backward pass's own.
        gradients = (FP32 + weight if weight == 2 else FP32) * trained
        reduced = min(trained, WHOLE_REDUCTION if weight == 2 else bucket)
        return HeldBytes(weight * total, gradients, masters, optimizer, FP32 * reduced)
    if level == 2:
        reduced = min(trained, bucket) * (2 if zero.get("overlap_comm") else 1)
        return HeldBytes(weight * total, FP32 * trained / ranks, masters, optimizer, FP32 * reduced)
    gathered = min(total, zero.get("stage3_max_live_parameters", total))
    gradients = FP32 * (trained / ranks + muon)  # Muon reads whole matrices' gradients
    weights, buffers, host = weight * total / ranks, FP32 * bucket + weight * gathered, 0.0
    if (node := zero.get("zero_hpz_partition_size", 1)) > 1:
        weights += weight * total / node  # whole in each group of ranks besides
    if _offloads(zero, "offload_optimizer"):
        host, gradients, masters, optimizer = gradients + masters + optimizer, 0.0, 0.0, 0.0
    if _offloads(zero, "offload_param"):
        host, weights = host + weights, 0.0
    return HeldBytes(weights, gradients, masters, optimizer, buffers, host=host)


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return zero.get(what, {}).get("device", "none") != "none"


@dataclass(frozen=True)
class SentBytes:
    """Bytes that a rank sends, and receives as many, in an optimizer step."""

    gather: float = 0.0  # parameters to where they are used
    reduce: float = 0.0  # gradients to where they are kept

    def __add__(self, other: SentBytes) -> SentBytes:
        return SentBytes(self.gather + other.gather, self.reduce + other.reduce)

    @property
    def total(self) -> float:
        """All of it."""
        return self.gather + self.reduce


def sent_bytes(
    level: int,
    ranks: int,
    count: ParameterCount,
    weight: int,
    micro_steps: int = 1,
    gradient: int = FP32,
    gathered: int | None = None,
) -> SentBytes:
    """Bytes that a rank sends in an optimizer step, by rings: (n - 1) / n of what is gathered or reduced.

    Args:
        level: ZeRO level.
        ranks: n.
        count: of the engine's model.
        weight: w.
        micro_steps: forward and backward passes of the step.
        gradient: bytes of a gradient on its way (`communication_data_type`).
        gathered: parameters that ZeRO-3 gathers in a micro-step: those of parts that run, and once more of
            parts that a backward pass goes through; None for all of them twice.
    """
    share = (ranks - 1) / ranks
    reduced, muon = gradient * count.trained * share, gradient * count.muon * share
    if level == 1:
        # In bf16 DeepSpeed reduces to all ranks, which costs twice.
        return SentBytes(weight * count.trained * share, reduced * 2 if weight == 2 else reduced + muon)
    reduced = (reduced + muon) * micro_steps  # without `reduce_scatter`, as Muon needs it
    if level == 2:
        return SentBytes(weight * count.trained * share, reduced)
    gathered = 2 * count.total if gathered is None else gathered
    return SentBytes(weight * gathered * share * micro_steps, reduced)


def checkpoint_bytes(count: ParameterCount, weight: int) -> float:
    """Bytes of a checkpoint of an engine, all ranks together, at any level.

    Masters in fp32, the optimizer's states, and frozen parts in the model's type.
    """
    states = FP32 * (2 * (count.trained - count.muon) + count.muon)
    return FP32 * count.trained + states + weight * (count.total - count.trained)
