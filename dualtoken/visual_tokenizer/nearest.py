"""Nearest-code search: exact, in bounded memory, and independent of precision settings and chunking."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 32  # codes per block of the two-level minimum, by timing
_FP64_CODES = 2048  # codes converted to fp64 at once
_ROUNDING = 2.0**-24  # unit roundoff of fp32


@contextmanager
def full_precision_matmul(device: torch.device) -> Iterator[None]:
    """Switch autocast and reduced-precision fp32 products (TF32, bf16) off for the enclosed block."""
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precisions = [product.fp32_precision for product in products]
    try:
        previous = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by its newer names, those in `torch.backends`
        previous = None
    with torch.autocast(device_type=device.type, enabled=False):
        if previous == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if previous is not None:
                torch.set_float32_matmul_precision(previous)
            for product, precision in zip(products, precisions, strict=True):
                product.fp32_precision = precision


class NonFiniteError(ValueError):
    """Vectors with NaN or infinity, which are near to nothing."""


class NearestCodeSearch:
    """Search over one codebook by Euclidean distance, prepared once and used for many batches of vectors.

    The norm of a vector is the same for all codes, so ``0.5 |w|^2 - x.w`` is enough: one matrix product of
    ``[-x, 1]`` and ``[w, 0.5 |w|^2]``. It is made in tiles that stay in the cache; of each only the minima
    over blocks of codes are kept, and the winning block is looked at again. Rows whose two best scores lie
    within the rounding error of fp32 are decided in fp64, so the result is the nearest code in fp64, the
    lowest index on exact ties. Several threads may search at once.

    Args:
        codebook: ``[K, C]`` fp32.
        tile_rows: vectors scored at once.
        tile_codes: codes scored at once; the scores take ``4 * tile_rows * tile_codes`` bytes.
    """

    def __init__(self, codebook: Tensor, tile_rows: int | None = None, tile_codes: int | None = None) -> None:
        if codebook.dtype != torch.float32:
            raise ValueError(f"the codebook is {codebook.dtype}; nearest-code search needs torch.float32")
        on_cpu = codebook.device.type == "cpu"
        size, width = codebook.shape
        self.codebook = codebook
        self.tile_rows = tile_rows or (512 if on_cpu else 4096)
        self.block = min(_BLOCK, size)
        tile_codes = tile_codes or (512 if on_cpu else 65536)
        self.tile_codes = max(1, tile_codes // self.block) * self.block
        self.rows_fp64 = 64 if on_cpu else self.tile_rows  # decided in fp64 at once
        self.padding = 0 if on_cpu else -(width + 1) % 8  # GPUs want aligned rows
        squares = [part.double().square_().sum(dim=1) for part in codebook.split(_FP64_CODES)]
        self.half_norms = torch.cat(squares).mul_(0.5)  # fp64
        self.largest_norm = self.half_norms.max().mul(2.0).sqrt().float()
        keys = torch.cat([codebook, self.half_norms.float().unsqueeze(1)], dim=1)
        if self.padding or size % self.block:
            keys = F.pad(keys, (0, self.padding, 0, -size % self.block))
            keys[size:, width] = torch.inf  # codes that only fill up the last block are never near
        self.blocks = keys.view(-1, self.block, keys.shape[1])
        self._tiles = keys.split(self.tile_codes)
        self._spare: list[Tensor] = []  # memory for scores that no thread uses now

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the index of the nearest code for each of ``vectors [N, C]`` fp32, ``[N]`` int64.

        The host waits for the device once, to learn which rows need fp64.

        Raises:
            NonFiniteError: on NaN or infinity.
        """
        codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        doubtful = torch.empty(len(vectors), dtype=torch.bool, device=vectors.device)
        memory = self._memory()
        with torch.no_grad(), full_precision_matmul(vectors.device):
            for start in range(0, len(vectors), self.tile_rows):
                rows = slice(start, start + self.tile_rows)
                codes[rows], doubtful[rows] = self._search(vectors[rows], memory)
            undecided = doubtful.nonzero().squeeze(1)
            for part in undecided.split(self.rows_fp64) if len(undecided) else ():
                if not torch.isfinite(vectors[part]).all():
                    raise NonFiniteError(f"vectors of shape {tuple(vectors.shape)} contain NaN or infinity")
                codes[part] = self._search_fp64(vectors[part])
        if vectors.device.type == "cpu":  # elsewhere a caching allocator makes it cheap to give it back
            self._spare.append(memory)
        return codes

    def _search(self, vectors: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes in fp32, and where rounding may have decided or a vector is not finite."""
        queries = F.pad(-vectors, (0, 1 + self.padding))
        queries[:, vectors.shape[1]] = 1.0
        minima = self._block_minima(queries, memory)  # [blocks, N]
        _, second_block, winner = _two_smallest(minima, dim=0)
        keys = _shaped(memory, len(queries), self.block, queries.shape[1])
        torch.index_select(self.blocks, 0, winner, out=keys)
        inside = torch.bmm(keys, queries.unsqueeze(2)).squeeze(2)  # [N, block]
        best, second_inside, offset = _two_smallest(inside, dim=1)
        # Rounding error of a score: a sum of C + 1 products, one factor of which was itself rounded. A code
        # as near as the one found is no longer than the vector and its distance from that one together, so
        # codes that are much longer than the others make no row doubtful.
        error, norm = (vectors.shape[1] + 4) * _ROUNDING, vectors.norm(dim=1)
        at_most = error * (norm + self.largest_norm).square()
        distance = (norm.square() + 2.0 * (best + at_most)).clamp_min(0.0).sqrt()
        longest = torch.minimum(self.largest_norm, norm + distance)
        bound = error * (norm * longest + longest.square())
        gap = torch.minimum(second_block, second_inside) - best
        return winner * self.block + offset, ~(gap > 2.0 * bound)

    def _memory(self) -> Tensor:
        """Return uninitialised memory, an earlier search's if any: fresh pages cost more than sums."""
        try:
            return self._spare.pop()
        except IndexError:
            codes = min(self.tile_codes, self.blocks.shape[0] * self.block)
            per_row = max(codes, self.block * self.blocks.shape[2])
            with torch.inference_mode(False):  # outside of it, nothing could be written into it again
                return self.blocks.new_empty(self.tile_rows * per_row)

    def _block_minima(self, queries: Tensor, memory: Tensor) -> Tensor:
        rows, minima = queries.t(), queries.new_empty(len(self.blocks), len(queries))
        memory = _shaped(memory, len(self._tiles[0]), len(queries))
        for tile, best in zip(self._tiles, minima.split(self.tile_codes // self.block), strict=True):
            scores = memory[: len(tile)]  # vectors side by side: minima of many at a time
            torch.mm(tile, rows, out=scores)
            torch.amin(scores.view(len(best), self.block, -1), dim=1, out=best)
        return minima

    def _search_fp64(self, vectors: Tensor) -> Tensor:
        queries = vectors.double()
        best = queries.new_full((len(queries),), torch.inf)
        codes = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        for start in range(0, len(self.codebook), _FP64_CODES):
            part = self.codebook[start : start + _FP64_CODES].double()
            half_norms = self.half_norms[start : start + _FP64_CODES]
            score, index = torch.addmm(half_norms, queries, part.t(), alpha=-1.0).min(dim=1)  # first on ties
            closer = score < best
            best, codes = torch.where(closer, score, best), torch.where(closer, index + start, codes)
        return codes


def _shaped(memory: Tensor, *shape: int) -> Tensor:
    """Return the beginning of flat memory as a tensor of this shape."""
    return memory[: math.prod(shape)].view(shape)


def _two_smallest(scores: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest value, the second smallest (infinity if none) and the index of the smallest.

    The smallest is taken out of `scores`: a copy would cost more than looking.
    """
    best, index = scores.min(dim=dim)
    scores.scatter_(dim, index.unsqueeze(dim), torch.inf)
    return best, scores.amin(dim=dim), index
