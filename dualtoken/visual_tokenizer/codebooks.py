"""Codebooks learned by exponential moving averages, updated once per optimizer step from all ranks.

Shapes: N vectors, D depths (``num_quantizers``), K codes, C width of a code, Dc codebooks (1 if all depths
share one).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualtoken.visual_tokenizer.nearest import NearestCodeSearch, NonFiniteError

_SMALLEST_CLUSTER = 1e-5  # a code whose average count has faded below this keeps its vector


@dataclass
class QuantizerStats:
    """Use of a codebook over the micro-batches and ranks of one optimizer step."""

    usage: list[float]  # [D] share of the K codes that were chosen at least once
    perplexity: list[float]  # [D] exp of the entropy of the choices, between 1 and K
    codebook_usage: float  # share of all codes that were chosen at any depth
    restarted: int  # codes replaced by latents in this update


class EMACodebooks(nn.Module):
    """Codebooks as fp32 buffers, and the statistics that move them.

    A forward pass in training mode only adds to the *window*: sums and counts of the vectors that chose each
    code, and a slice of a pool of restart candidates. :meth:`update` reduces the window over the ranks in a
    single collective, moves the averages, and replaces codes that went out of use by candidates. Every rank
    computes the same numbers, and the sums do not depend on how the vectors were spread over depths,
    micro-batches and ranks, up to rounding.

    Args:
        num_codebooks: Dc; depth d uses codebook d modulo Dc.
        codebook_size: K.
        code_width: C.
        num_quantizers: D.
        decay: of the moving averages.
        restart_unused_codes: replace codes whose average count falls below ``restart_threshold``.
        restart_threshold: in vectors per optimizer step; a fresh code starts at 1.
        seed: of the first codes and of the choice of candidates.
        name: for error messages.
    """

    codebook: Tensor
    cluster_size: Tensor
    embed_sum: Tensor
    num_updates: Tensor
    window: Tensor

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        code_width: int,
        num_quantizers: int,
        decay: float = 0.99,
        restart_unused_codes: bool = True,
        restart_threshold: float = 1.0,
        seed: int = 0,
        name: str = "latent",
    ) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size, self.code_width = num_codebooks, codebook_size, code_width
        self.num_quantizers, self.decay = num_quantizers, decay
        self.restart_unused_codes, self.restart_threshold = restart_unused_codes, restart_threshold
        self.seed, self.name = seed, name
        self.frozen = False  # True: no statistics, no updates (a training phase that keeps this codebook)
        shape = (num_codebooks, codebook_size, code_width)
        self.register_buffer("codebook", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("cluster_size", torch.zeros(shape[:2], dtype=torch.float32))
        self.register_buffer("embed_sum", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        # Flat, so that one all-reduce takes it all; the parts are those of `_window_parts`.
        vectors = num_codebooks * codebook_size * code_width
        length = 2 * vectors + (num_quantizers + num_codebooks) * codebook_size
        self.register_buffer("window", torch.zeros(length, dtype=torch.float32), persistent=False)
        self._window_empty = True
        self._candidate_slot: tuple[int, int] | None = None
        self._search: list[NearestCodeSearch] | None = None
        self._search_key: tuple | None = None
        self._updates: tuple[tuple | None, int] | None = None
        self.reset_codebook()

    def reset_codebook(self) -> None:
        """Draw normal codes and forget all averages; the first update replaces unused codes by latents.

        They depend on the seed alone, not on the global generator, so that all ranks start from the same.
        """
        if not self.codebook.is_meta:
            generator = torch.Generator().manual_seed(self.seed)
            shape = self.codebook.shape
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            self.codebook.copy_(drawn)
        for buffer in (self.cluster_size, self.embed_sum, self.num_updates):
            buffer.zero_()
        self.reset_window()

    def reset_window(self) -> None:
        """Throw away what was gathered since the last update, as for an optimizer step that is skipped."""
        self.window.zero_()
        self._window_empty = True
        self._candidate_slot = None

    def _apply(self, fn, recurse: bool = True):
        """Follow moves between devices but stay fp32: ``module.bfloat16()`` must not round a codebook."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    # -- gathering -----------------------------------------------------------------------------------------

    def _window_parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return views of the window: sums [Dc, K, C], counts [D, K], pool [Dc, K, C], filled [Dc, K]."""
        books, size, width = self.codebook.shape
        depth = self.num_quantizers
        vectors = books * size * width
        sums, counts, pool, filled = self.window.split([vectors, depth * size, vectors, books * size])
        return (
            sums.view(books, size, width),
            counts.view(depth, size),
            pool.view(books, size, width),
            filled.view(books, size),
        )

    def set_candidate_slot(self, index: int, total: int) -> None:
        """Say which of ``total`` slices of the candidate pool the next micro-batch fills.

        With ``index = micro_step * world_size + rank`` and ``total = micro_steps * world_size`` the pool,
        and so the training, does not depend on how a global batch is spread over ranks and micro-batches.
        Without a call each rank fills its own slice, and the last micro-batch counts.
        """
        if not 0 <= index < total:
            raise ValueError(f"no candidate slot {index} of {total}; the index must lie in [0, total)")
        self._candidate_slot = (index, total)

    def _slot(self) -> tuple[int, int]:
        if self._candidate_slot is not None:
            return self._candidate_slot
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def _generator(self, *salt: int) -> torch.Generator:
        """Return a CPU generator that depends on the seed, the number of updates and ``salt`` alone."""
        state = self.seed
        for value in (self._number_of_updates(), *salt):  # Knuth's MMIX constants
            state = (state * 6364136223846793005 + value * 1442695040888963407 + 1) % 2**63
        return torch.Generator().manual_seed(state)

    def _number_of_updates(self) -> int:
        """Return ``num_updates`` as a number, read from the device only when it has changed."""
        key = _content(self.num_updates)
        if self._updates is None or key is None or self._updates[0] != key:
            self._updates = (key, int(self.num_updates))
        return self._updates[1]

    @torch.no_grad()
    def _accumulate(self, inputs: list[Tensor], codes: Tensor) -> None:
        """Add a micro-batch: per depth the vectors ``[N, C]`` that were searched; their ``codes [N, D]``."""
        sums, counts, _, _ = self._window_parts()
        # A later micro-batch is summed apart first: then additions happen in the order they would over ranks.
        target = sums if self._window_empty else torch.zeros_like(sums)
        ones = codes.new_ones(len(codes), dtype=counts.dtype)
        for depth, vectors in enumerate(inputs):
            chosen = codes[:, depth]
            target[depth % self.num_codebooks].index_add_(0, chosen, vectors)
            counts[depth].index_add_(0, chosen, ones)
        if target is not sums:
            sums += target
        self._window_empty = False
        if self.restart_unused_codes:
            self._offer_candidates(inputs)

    def _offer_candidates(self, inputs: list[Tensor]) -> None:
        """Fill this micro-batch's slice of the pool with vectors drawn from all depths of each codebook."""
        index, total = self._slot()
        start, stop = (self.codebook_size * i // total for i in (index, index + 1))
        _, _, pool, filled = self._window_parts()
        for book in range(self.num_codebooks):
            sources = inputs[book :: self.num_codebooks]
            rows, wanted = len(sources[0]), stop - start
            available = rows * len(sources)
            if not wanted or not available:
                continue
            generator = self._generator(index, book)
            drawn = torch.randperm(available, generator=generator).repeat(-(-wanted // available))[:wanted]
            for position, vectors in enumerate(sources):
                places = (drawn // rows == position).nonzero().squeeze(1)
                picked = vectors[(drawn[places] % rows).to(vectors.device, non_blocking=True)]
                pool[book, (places + start).to(pool.device, non_blocking=True)] = picked
            if wanted > available:  # duplicates must part ways, else all but one of them stay unused
                noise = torch.randn(wanted, self.code_width, generator=generator)
                noise = noise.to(pool.device, non_blocking=True)
                pool[book, start:stop] += 0.01 * pool[book, start:stop].square().mean().sqrt() * noise
            filled[book, start:stop] = 1.0

    # -- update --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, group: dist.ProcessGroup | None = None) -> QuantizerStats:
        """Move the codebooks by the window of all ranks of ``group`` (one all-reduce), then empty the window.

        Raises:
            RuntimeError: if no rank has seen a training batch since the last update, or two have filled the
                same candidate slot.
        """
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(self.window, group=group)
        sums, counts, pool, filled = self._window_parts()
        book_counts = counts.view(-1, self.num_codebooks, self.codebook_size).sum(dim=0)
        cluster_size = self.cluster_size.mul(self.decay).add_(book_counts, alpha=1.0 - self.decay)
        unused = cluster_size < self.restart_threshold
        # All that the host has to know, in one wait for the device.
        shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1.0)
        perplexity = (-torch.special.xlogy(shares, shares).sum(dim=1)).exp()
        usage = (counts > 0).float().mean(dim=1)
        of_step = torch.stack([counts.sum(), filled.max(), (book_counts > 0).float().mean()])
        of_books = torch.cat([unused.sum(dim=1), (filled > 0).sum(dim=1)])
        known = torch.cat([of_step, of_books, usage, perplexity]).tolist()
        vectors, most_fillers, used = known[:3]
        if not vectors:
            raise RuntimeError(
                f"{self.name} codebook: no vectors since the last update; "
                "run a forward pass in training mode first"
            )
        if most_fillers > 1:
            raise RuntimeError(
                f"{self.name} codebook: several ranks filled the same candidate slot; call "
                "set_candidate_slot(micro_step * world_size + rank, micro_steps * world_size) before it"
            )
        self.cluster_size.copy_(cluster_size)
        self.embed_sum.mul_(self.decay).add_(sums, alpha=1.0 - self.decay)
        books, depth = self.num_codebooks, self.num_quantizers
        restarted = 0
        if self.restart_unused_codes:
            needed, offered = ([int(n) for n in known[3 + i * books :][:books]] for i in (0, 1))
            restarted = self._restart(pool, filled > 0, unused, needed, offered)
        self._codes_from_averages()
        updates = self._number_of_updates() + 1
        self.num_updates.fill_(updates)
        self._updates = (_content(self.num_updates), updates)
        self.reset_window()
        by_depth = known[3 + 2 * books :]
        return QuantizerStats(by_depth[:depth], by_depth[depth:], used, restarted)

    def _codes_from_averages(self) -> None:
        size = self.cluster_size.unsqueeze(2)
        self.codebook.copy_(torch.where(size > _SMALLEST_CLUSTER, self.embed_sum / size, self.codebook))

    def _restart(
        self, pool: Tensor, filled: Tensor, unused: Tensor, needed: list[int], offered: list[int]
    ) -> int:
        """Replace ``unused [Dc, K]`` codes by the candidates in ``pool``, which is ``filled [Dc, K]``.

        ``needed`` and ``offered`` are the numbers of unused codes and of candidates in each codebook; the
        smaller ones, summed, are returned.
        """
        restarted = 0
        for book in range(self.num_codebooks):
            count = min(needed[book], offered[book])
            order = torch.randperm(offered[book], generator=self._generator(-1, book))[:count]
            chosen = _places(filled[book], offered[book])[order.to(pool.device, non_blocking=True)]
            dead = _places(unused[book], needed[book])[:count]
            self.embed_sum[book, dead] = pool[book, chosen]
            self.cluster_size[book, dead] = 1.0
            restarted += count
        return restarted

    # -- search --------------------------------------------------------------------------------------------

    def _searches(self) -> list[NearestCodeSearch]:
        """Return the search for each depth; prepared anew when the codebook has changed."""
        key, search = _content(self.codebook), self._search
        if search is None or key is None or key != self._search_key:
            search = self._search = None  # free the old one first
            search = [NearestCodeSearch(book) for book in self.codebook]
            self._search, self._search_key = search, key
        return search * (self.num_quantizers // self.num_codebooks)

    def _flatten(self, latents: Tensor, width: int) -> Tensor:
        """Return ``latents [..., width]`` as fp32 rows outside autograd, or say what is wrong with them."""
        if latents.shape[-1] != width:
            raise ValueError(f"{self.name} latents are {latents.shape[-1]} wide, expected {width}")
        return latents.detach().reshape(-1, width).float()

    @contextmanager
    def _naming_latents(self, latents: Tensor) -> Iterator[None]:
        """Say whose latents contain NaN or infinity where a search finds some."""
        try:
            yield
        except NonFiniteError:
            bad = int(latents.numel() - torch.isfinite(latents).sum())
            raise NonFiniteError(
                f"{self.name} latents contain NaN or infinity ({bad} of {latents.numel()} values); "
                "the weights of the layers before the quantizer, or their input, are broken"
            ) from None

    def _check_codes(self, codes: Tensor) -> None:
        if codes.shape[-1] != self.num_quantizers:
            raise ValueError(f"{self.name} codes are {codes.shape[-1]} deep, expected {self.num_quantizers}")
        if codes.numel():
            smallest, largest = torch.stack(codes.aminmax()).tolist()
            if smallest < 0 or largest >= self.codebook_size:
                raise ValueError(
                    f"{self.name} codes lie in [{smallest}, {largest}], "
                    f"expected [0, {self.codebook_size - 1}]"
                )


def _content(tensor: Tensor) -> tuple | None:
    """Something that changes with a tensor's content; None of one of inference mode, which has none."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version, tensor.device)


def _places(mask: Tensor, count: int) -> Tensor:
    """Return where ``mask [K]`` is true, knowing that it is so ``count`` times: no wait for the device."""
    return torch.nonzero_static(mask, size=count)[:, 0]
