"""Nearest-code search: exact, in bounded memory, and independent of precision settings, chunking and device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_BLOCK = 128  # codes per block of the two-level minimum
_ROUNDING = 2.0**-24  # unit roundoff of fp32


@contextmanager
def full_precision_matmul(device: torch.device) -> Iterator[None]:
    """Switch autocast and reduced-precision fp32 products (TF32, bf16) off for the enclosed block."""
    previous = torch.get_float32_matmul_precision()
    with torch.autocast(device_type=device.type, enabled=False):
        if previous == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(previous)


class NearestCodeSearch:
    """Squared-distance search over one codebook, prepared once and used for many batches of vectors.

    The vector's own norm is the same for all codes, so ``0.5 |w|^2 - x.w`` is enough; it is written by one ``addmm`` per
    chunk of rows into a reused buffer. Rows whose best two scores lie within the rounding error of fp32 are decided
    again in fp64, so the result is the fp64 nearest neighbour (the lowest index on exact ties), whatever the chunking.

    Args:
        codebook: ``[K, C]`` fp32.
        chunk_rows: rows scored at once; the buffer takes ``4 * chunk_rows * K`` bytes.
    """

    def __init__(self, codebook: Tensor, chunk_rows: int | None = None) -> None:
        if codebook.dtype != torch.float32:
            raise ValueError(f"the codebook is {codebook.dtype}; nearest-code search needs torch.float32")
        self.codebook = codebook
        size, width = codebook.shape
        self.chunk_rows = chunk_rows or (256 if codebook.device.type == "cpu" else 4096)
        half_norms = codebook.double().square().sum(dim=1).mul_(0.5)
        self.half_norms = half_norms.float()
        self.largest_norm = half_norms.max().mul(2.0).sqrt().float()
        padding = -size % _BLOCK if size > _BLOCK else 0
        if padding:  # unreachable codes fill the last block
            codebook = torch.cat([codebook, codebook.new_zeros(padding, width)])
            self.half_norms = torch.cat([self.half_norms, self.half_norms.new_full((padding,), torch.inf)])
        self.transposed = codebook.t()
        self._buffer: Tensor | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the index of the nearest code for each of ``vectors [N, C]``, ``[N]`` int64."""
        codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        with torch.no_grad(), full_precision_matmul(vectors.device):
            for start in range(0, len(vectors), self.chunk_rows):
                chunk = vectors[start : start + self.chunk_rows]
                codes[start : start + len(chunk)] = self._search(chunk)
        if vectors.device.type != "cpu":  # a caching allocator makes it cheap to give the buffer back
            self._buffer = None
        return codes

    def _search(self, vectors: Tensor) -> Tensor:
        rows, size = len(vectors), len(self.half_norms)
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = vectors.new_empty(rows, size)
        scores = self._buffer[:rows]
        torch.addmm(self.half_norms, vectors, self.transposed, alpha=-1.0, out=scores)
        if size <= _BLOCK:
            best, second, codes = _two_smallest(scores)
        else:
            blocks = scores.view(rows, size // _BLOCK, _BLOCK)
            minima = blocks.amin(dim=2)
            _, second_block, winner = _two_smallest(minima)
            inside = blocks[torch.arange(rows, device=vectors.device), winner]  # [rows, _BLOCK]
            best, second_inside, offset = _two_smallest(inside)
            second = torch.minimum(second_block, second_inside)
            codes = winner * _BLOCK + offset
        # Bound of the rounding error of a score: a dot product of C terms and the rounded half norm.
        scale = vectors.norm(dim=1) * self.largest_norm + self.largest_norm.square()
        bound = (self.codebook.shape[1] + 4) * _ROUNDING * scale
        doubtful = (second - best <= 2.0 * bound).nonzero().squeeze(1)
        for part in doubtful.split(64):
            codes[part] = self._search_fp64(vectors[part])
        return codes

    def _search_fp64(self, vectors: Tensor) -> Tensor:
        codebook = self.codebook.double()
        scores = 0.5 * codebook.square().sum(dim=1) - vectors.double() @ codebook.t()
        return _first_minimum(scores)


def _first_minimum(scores: Tensor) -> Tensor:
    """Return the index of the minimum of each row, the lowest on ties."""
    index = torch.arange(scores.shape[1], device=scores.device)
    ties = scores == scores.amin(dim=1, keepdim=True)
    return torch.where(ties, index, scores.shape[1]).amin(dim=1)


def _two_smallest(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return smallest value, second smallest value and the index of the smallest of each row ``[N, M]``; spoils M = 1."""
    best, index = scores.min(dim=1)
    if scores.shape[1] == 1:
        return best, torch.full_like(best, torch.inf), index
    others = scores.scatter(1, index.unsqueeze(1), torch.inf)
    return best, others.amin(dim=1), index
