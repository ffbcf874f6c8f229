"""Vector quantizers with codebooks learned by exponential moving averages: residual (RVQ) and multi-codebook (MCQ).

Shapes: N vectors, D depths (``num_quantizers``), K codes, C width of a code, Dc codebooks (1 when shared by all depths).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dualtoken.nearest import NearestCodeSearch

_SMALLEST_CLUSTER = 1e-5  # a code whose average count has faded below this keeps its vector


@dataclass
class QuantizerOutput:
    """What a quantizer makes of latents ``[..., C]``."""

    quantized: Tensor  # [..., C] fp32; gradients pass straight through to the latents
    codes: Tensor  # [..., D] int64
    commitment_loss: Tensor  # scalar fp32


@dataclass
class QuantizerStats:
    """Use of a codebook over the micro-batches and ranks of one optimizer step."""

    usage: list[float]  # [D] share of the K codes that were chosen at least once
    perplexity: list[float]  # [D] exp of the entropy of the choices, between 1 and K
    restarted: int  # codes replaced by latents in this update


class _StraightThrough(torch.autograd.Function):
    """Hand out ``quantized`` and the commitment loss as functions of the latents, in one node.

    Keeps only the sum of the residuals, ``sum_d (z - partial sum of d vectors)``, which is the loss's gradient up to a factor.
    """

    @staticmethod
    def forward(ctx, latents: Tensor, quantized: Tensor, residual_sum: Tensor, loss: Tensor, scale: float):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(residual_sum)
        ctx.scale, ctx.dtype = scale, latents.dtype
        return quantized.view_as(quantized), loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_quantized: Tensor | None, grad_loss: Tensor | None):
        (residual_sum,) = ctx.saved_tensors
        grad = torch.zeros_like(residual_sum) if grad_quantized is None else grad_quantized.float()
        if grad_loss is not None:
            grad = torch.addcmul(grad, residual_sum, grad_loss.float(), value=ctx.scale)
        return grad.to(ctx.dtype), None, None, None, None


class EMACodebooks(nn.Module):
    """Codebooks as fp32 buffers, with one update per optimizer step from all depths, micro-batches and ranks.

    A forward in training mode only adds to the *window*: sums and counts of the vectors that chose each code, and a slice of
    a pool of restart candidates. ``update`` reduces the window over the ranks in a single collective, moves the averages,
    and replaces codes that went out of use by candidates. Every rank computes the same numbers.

    Args:
        num_codebooks: Dc.
        codebook_size: K.
        code_width: C.
        num_quantizers: D.
        decay: of the moving averages.
        restart_unused_codes: replace codes whose average count falls below ``restart_threshold``.
        restart_threshold: in vectors per optimizer step; a fresh code starts at 1.
        seed: of the choice of candidates.
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
        vectors = num_codebooks * codebook_size * code_width
        # sums [Dc, K, C] | counts [D, K] | pool [Dc, K, C] | filled [Dc, K]: flat, so that one all-reduce takes it all.
        length = 2 * vectors + (num_quantizers + num_codebooks) * codebook_size
        self.register_buffer("window", torch.zeros(length, dtype=torch.float32), persistent=False)
        self._candidate_slot: tuple[int, int] | None = None
        self._search: list[NearestCodeSearch] | None = None
        self._search_key: tuple | None = None
        self.reset_codebook()

    def reset_codebook(self) -> None:
        """Draw normal codes and forget all averages; the first update then restarts unused codes from the data."""
        nn.init.normal_(self.codebook)
        self.reset_averages()

    def reset_averages(self) -> None:
        """Forget all that was counted; codes keep their vectors until they are chosen or restarted."""
        for buffer in (self.cluster_size, self.embed_sum, self.num_updates, self.window):
            buffer.zero_()

    def _apply(self, fn, recurse: bool = True):
        """Follow moves between devices but stay fp32: ``module.bfloat16()`` must not round a codebook."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    # -- window ---------------------------------------------------------------------------------------------------

    def _window_parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return views of the window: sums [Dc, K, C], counts [D, K], pool [Dc, K, C], filled [Dc, K]."""
        books, size, width, depth = (
            self.num_codebooks,
            self.codebook_size,
            self.code_width,
            self.num_quantizers,
        )
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

        With ``index = micro_step * world_size + rank`` and ``total = micro_steps * world_size`` the pool, and so the
        training, does not depend on how a global batch is spread over ranks and micro-batches.
        """
        if not 0 <= index < total:
            raise ValueError(
                f"candidate slot {index} of {total} does not exist; index must lie in [0, total)"
            )
        self._candidate_slot = (index, total)

    def _slot(self) -> tuple[int, int]:
        if self._candidate_slot is not None:
            return self._candidate_slot
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def _generator(self, *salt: int) -> torch.Generator:
        """Return a CPU generator that depends on the seed, the update count and ``salt`` alone."""
        state = self.seed
        for value in (int(self.num_updates), *salt):
            state = (state * 6364136223846793005 + value * 1442695040888963407 + 1) % 2**63
        return torch.Generator().manual_seed(state)

    @torch.no_grad()
    def _accumulate(self, inputs: list[Tensor], codes: Tensor) -> None:
        """Add one micro-batch to the window: per depth the vectors ``[N, C]`` that were searched, and ``codes [N, D]``."""
        sums, counts, _, _ = self._window_parts()
        micro_sums = torch.zeros_like(
            sums
        )  # summed apart first: the order of additions is that of several ranks
        for depth, vectors in enumerate(inputs):
            chosen = codes[:, depth]
            micro_sums[depth % self.num_codebooks].index_add_(0, chosen, vectors)
            counts[depth] += torch.bincount(chosen, minlength=self.codebook_size)
        sums += micro_sums
        if self.restart_unused_codes:
            self._offer_candidates(inputs)

    def _offer_candidates(self, inputs: list[Tensor]) -> None:
        index, total = self._slot()
        start, stop = (self.codebook_size * i // total for i in (index, index + 1))
        if start == stop:
            return
        _, _, pool, filled = self._window_parts()
        for book in range(self.num_codebooks):
            sources = inputs[book :: self.num_codebooks]
            count, available = stop - start, len(sources) * len(sources[0])
            generator = self._generator(index, book)
            order = torch.randperm(available, generator=generator)
            order = order.repeat(-(-count // available))[:count]
            which = order // len(sources[0])
            for position, vectors in enumerate(sources):
                rows = (which == position).nonzero().squeeze(1)
                picked = vectors[(order[rows] % len(vectors)).to(vectors.device)]
                pool[book, (rows + start).to(pool.device)] = picked
            if count > available:  # duplicates must part ways, else one of them stays unused
                spread = 0.01 * pool[book, start:stop].square().mean().sqrt()
                noise = torch.randn(count, self.code_width, generator=generator).to(pool.device)
                pool[book, start:stop] += spread * noise
            filled[book, start:stop] = 1.0

    # -- update ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, group: dist.ProcessGroup | None = None) -> QuantizerStats:
        """Move the codebooks by the window of all ranks of ``group`` (one all-reduce), then empty the window.

        Raises:
            RuntimeError: if no rank saw a training batch since the last update, or two filled the same candidate slot.
        """
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(self.window, group=group)
        sums, counts, pool, filled = self._window_parts()
        if not counts.any():
            raise RuntimeError(
                f"{self.name} codebook: no vectors since the last update; run a forward pass in training mode first"
            )
        if filled.max() > 1:
            raise RuntimeError(
                f"{self.name} codebook: several ranks filled the same candidate slot; "
                "call set_candidate_slot(micro_step * world_size + rank, micro_steps * world_size)"
            )
        book_counts = counts.view(-1, self.num_codebooks, self.codebook_size).sum(
            dim=0
        )  # depth d uses book d % Dc
        self.cluster_size.mul_(self.decay).add_(book_counts, alpha=1.0 - self.decay)
        self.embed_sum.mul_(self.decay).add_(sums, alpha=1.0 - self.decay)
        restarted = self._restart(pool, filled) if self.restart_unused_codes else 0
        self.codebook.copy_(self._codes_from_averages())
        stats = self._stats(counts, restarted)
        self.num_updates += 1
        self.window.zero_()
        self._candidate_slot = None
        return stats

    def _codes_from_averages(self) -> Tensor:
        size = self.cluster_size.unsqueeze(2)
        return torch.where(size > _SMALLEST_CLUSTER, self.embed_sum / size, self.codebook)

    def _restart(self, pool: Tensor, filled: Tensor) -> int:
        restarted = 0
        for book in range(self.num_codebooks):
            dead = (self.cluster_size[book] < self.restart_threshold).nonzero().squeeze(1)
            offered = filled[book].nonzero().squeeze(1)
            if not len(dead) or not len(offered):
                continue
            order = torch.randperm(len(offered), generator=self._generator(-1, book)).to(offered.device)
            dead = dead[: len(offered)]
            self.embed_sum[book, dead] = pool[book, offered[order[: len(dead)]]]
            self.cluster_size[book, dead] = 1.0
            restarted += len(dead)
        return restarted

    @staticmethod
    def _stats(counts: Tensor, restarted: int) -> QuantizerStats:
        shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1.0)
        entropy = -torch.special.xlogy(shares, shares).sum(dim=1)
        usage = (counts > 0).float().mean(dim=1)
        return QuantizerStats(usage.tolist(), entropy.exp().tolist(), restarted)

    # -- search ---------------------------------------------------------------------------------------------------

    def _searches(self) -> list[NearestCodeSearch]:
        """Return the prepared search of each codebook, made anew when the codebook has changed."""
        key = (self.codebook.data_ptr(), self.codebook._version, self.codebook.device)
        if self._search is None or key != self._search_key:
            self._search = [NearestCodeSearch(book) for book in self.codebook]
            self._search_key = key
        return self._search

    def _flatten(self, latents: Tensor, width: int) -> Tensor:
        """Return ``latents [..., width]`` as fp32 rows, or say what is wrong with them."""
        if latents.shape[-1] != width:
            raise ValueError(f"{self.name} latents are {latents.shape[-1]} wide, expected {width}")
        flat = latents.detach().reshape(-1, width).float()
        finite = torch.isfinite(flat)
        if not finite.all():
            bad = int(flat.numel() - finite.sum())
            raise ValueError(
                f"{self.name} latents contain NaN or infinity ({bad} of {flat.numel()} values); "
                "the input or the weights of the layers before the quantizer are broken"
            )
        return flat

    def _check_codes(self, codes: Tensor) -> None:
        if codes.shape[-1] != self.num_quantizers:
            raise ValueError(
                f"{self.name} codes have depth {codes.shape[-1]}, expected {self.num_quantizers}"
            )
        if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < self.codebook_size):
            raise ValueError(
                f"{self.name} codes lie in [{int(codes.min())}, {int(codes.max())}], "
                f"expected [0, {self.codebook_size - 1}]"
            )


class ResidualVQ(EMACodebooks):
    """Residual vector quantization: depth d codes what the first d - 1 vectors left over (arXiv 2203.01941, 3.1).

    Args:
        codebook_size: K.
        dim: width of latents and codes, C.
        num_quantizers: D.
        shared_codebook: one codebook for all depths.
        kwargs: see :class:`EMACodebooks`.
    """

    def __init__(
        self, codebook_size: int, dim: int, num_quantizers: int, shared_codebook: bool = True, **kwargs
    ) -> None:
        super().__init__(
            1 if shared_codebook else num_quantizers, codebook_size, dim, num_quantizers, **kwargs
        )

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize ``latents [..., C]``; in training mode also add to the window.

        The commitment loss is the mean over depths d of the mean squared distance between the latents and the sum of
        the first d code vectors; its gradient goes to the latents alone (arXiv 2203.01941, eq. 8).

        Raises:
            ValueError: on latents of another width or with NaN or infinite values.
        """
        residual = self._flatten(latents, self.code_width)
        count, depth = len(residual), self.num_quantizers
        codes = torch.empty(count, depth, dtype=torch.int64, device=residual.device)
        quantized = torch.zeros_like(residual)
        residual_sum = torch.zeros_like(residual)
        loss = residual.new_zeros(())
        inputs: list[Tensor] = []
        learning = self.training and not self.frozen
        with torch.no_grad():
            for d, search in enumerate(self._searches() * (depth // self.num_codebooks)):
                codes[:, d] = search(residual)
                vectors = F.embedding(codes[:, d], self.codebook[d % self.num_codebooks])
                if learning:
                    inputs.append(residual)
                residual = (
                    residual - vectors
                )  # never in place: the window still reads the vectors of this depth
                quantized += vectors
                residual_sum += residual
                loss += residual.square().mean() / depth
            if learning:
                self._accumulate(inputs, codes)
        scale = 2.0 / (depth * max(residual.numel(), 1))
        quantized, loss = _StraightThrough.apply(
            latents, quantized.view(latents.shape), residual_sum.view(latents.shape), loss, scale
        )
        return QuantizerOutput(quantized, codes.view(*latents.shape[:-1], depth), loss)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Return the codes ``[..., D]`` of ``latents [..., C]``, whatever the mode, and leave the window alone."""
        residual = self._flatten(latents, self.code_width)
        codes = []
        for d, search in enumerate(self._searches() * (self.num_quantizers // self.num_codebooks)):
            codes.append(search(residual))
            residual = residual - F.embedding(codes[d], self.codebook[d % self.num_codebooks])
        return torch.stack(codes, dim=1).view(*latents.shape[:-1], self.num_quantizers)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the latents of ``codes [..., D]``, ``[..., C]`` fp32: bit for bit the ``quantized`` of the forward pass."""
        self._check_codes(codes)
        quantized = torch.zeros(*codes.shape[:-1], self.code_width, device=codes.device)
        for d in range(self.num_quantizers):
            quantized += F.embedding(codes[..., d], self.codebook[d % self.num_codebooks])
        return quantized

    def additive_codebooks(self) -> Tensor:
        """Return ``[Dc, K, C]`` such that the sum of one row per depth is the quantized latent."""
        return self.codebook


class MultiCodebookVQ(EMACodebooks):
    """Multi-codebook quantization: the latent is cut into D chunks, each matched by direction (arXiv 2502.20321, 3.2).

    Chunks and codes are l2-normalised, so a quantized chunk is a unit vector. UniTok learns the codebooks by gradient;
    here they follow moving averages like those of :class:`ResidualVQ`, re-normalised after every update.

    Args:
        codebook_size: K, of each of the D codebooks.
        dim: width of the latents; a code is ``dim / num_quantizers`` wide.
        num_quantizers: D.
        kwargs: see :class:`EMACodebooks`.
    """

    def __init__(self, codebook_size: int, dim: int, num_quantizers: int, **kwargs) -> None:
        if dim % num_quantizers:
            raise ValueError(
                f"latents {dim} wide cannot be cut into {num_quantizers} equal chunks; "
                "choose a codebook_dim that num_quantizers divides"
            )
        self.dim = dim
        super().__init__(num_quantizers, codebook_size, dim // num_quantizers, num_quantizers, **kwargs)

    def reset_codebook(self) -> None:
        """Draw directions uniformly and forget all averages."""
        nn.init.normal_(self.codebook)
        self.codebook.copy_(F.normalize(self.codebook, dim=-1))
        self.reset_averages()

    def _codes_from_averages(self) -> Tensor:
        return F.normalize(super()._codes_from_averages(), dim=-1)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize ``latents [..., dim]``; in training mode also add to the window.

        The commitment loss is the mean squared distance between the normalised chunks and their codes.

        Raises:
            ValueError: on latents of another width or with NaN or infinite values.
        """
        self._flatten(latents, self.dim)
        depth = self.num_quantizers
        with torch.autocast(device_type=latents.device.type, enabled=False):
            chunks = F.normalize(latents.reshape(-1, depth, self.code_width).float(), dim=-1)  # [N, D, C]
        rows = chunks.detach()
        codes = torch.stack([search(rows[:, d]) for d, search in enumerate(self._searches())], dim=1)
        with torch.no_grad():
            quantized = self._gather(codes)
            residual = rows - quantized
            loss = residual.square().mean()
            if self.training and not self.frozen:
                self._accumulate([rows[:, d] for d in range(depth)], codes)
        quantized, loss = _StraightThrough.apply(
            chunks, quantized, residual, loss, 2.0 / max(rows.numel(), 1)
        )
        return QuantizerOutput(quantized.view(latents.shape), codes.view(*latents.shape[:-1], depth), loss)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Return the codes ``[..., D]`` of ``latents [..., dim]``, whatever the mode, and leave the window alone."""
        flat = self._flatten(latents, self.dim).view(-1, self.num_quantizers, self.code_width)
        rows = F.normalize(flat, dim=-1)
        codes = torch.stack([search(rows[:, d]) for d, search in enumerate(self._searches())], dim=1)
        return codes.view(*latents.shape[:-1], self.num_quantizers)

    def _gather(self, codes: Tensor) -> Tensor:
        """Return the code vectors ``[..., D, C]`` of ``codes [..., D]``."""
        vectors = [F.embedding(codes[..., d], self.codebook[d]) for d in range(self.num_quantizers)]
        return torch.stack(vectors, dim=-2)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the latents of ``codes [..., D]``, ``[..., dim]`` fp32: bit for bit the ``quantized`` of the forward pass."""
        self._check_codes(codes)
        return self._gather(codes).flatten(-2)

    def additive_codebooks(self) -> Tensor:
        """Return ``[D, K, dim]``, each chunk's codes at its place and zeros elsewhere: their sum is the latent."""
        depth, size, width = self.codebook.shape
        padded = self.codebook.new_zeros(depth, size, depth, width)
        for d in range(depth):
            padded[d, :, d] = self.codebook[d]
        return padded.flatten(-2)
