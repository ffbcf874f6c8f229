"""Choosing a token or code from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How to choose: `temperature` 0 takes the most likely; `top_k` 0 and `top_p` 1 keep all candidates."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}; expected 0 (most likely) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}; expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; expected more than 0, at most 1 (all)")

    def choose(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Choose from logits [N, K] by uniform noise [N] in [0, 1): indices [N].

        The noise picks the place in the cumulative distribution of the candidates, so equal noise gives equal
        choices on any device and in any batch.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = (logits.double() / self.temperature).softmax(dim=-1)
        if self.top_k == 0 and self.top_p == 1:
            return _place(probabilities, noise)
        count = min(self.top_k, probabilities.shape[-1]) or probabilities.shape[-1]
        candidates, indices = probabilities.topk(count, dim=-1)  # descending
        candidates = candidates / candidates.sum(dim=-1, keepdim=True)
        before = candidates.cumsum(dim=-1) - candidates
        candidates = candidates.masked_fill(before >= self.top_p, 0.0)  # the first one always stays
        return indices.gather(1, _place(candidates, noise)[:, None])[:, 0]


def row_noise(
    seed: int | Sequence[int] | None, rows: int, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Uniform noise [rows, *shape], each row from a seed of its own: its results do not depend on the batch.

    Row i uses `seed` + i, or its own entry of a list of seeds; None draws a seed from torch's generator.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise ValueError(f"got {len(seeds)} seeds for {rows} rows; give one per row, or a single one")
    noise = [
        torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds
    ]
    return torch.stack(noise).to(device)


def _place(probabilities: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Where `noise` falls in the cumulative distribution; never on a class of probability zero."""
    cumulative = probabilities.cumsum(dim=-1)
    target = (noise.to(cumulative.dtype) * cumulative[:, -1])[:, None]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(index, last)
