"""The two vector quantizers: residual (RVQ) and multi-codebook (MCQ); both search and learn in fp32.

Shapes: N vectors, D depths (``num_quantizers``), K codes, C width of a code, Dc codebooks (1 if all depths
share one).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualtoken.visual_tokenizer.codebooks import EMACodebooks, QuantizerStats

__all__ = ["EMACodebooks", "MultiCodebookVQ", "QuantizerOutput", "QuantizerStats", "ResidualVQ"]


@dataclass
class QuantizerOutput:
    """What a quantizer makes of latents ``[..., C]``."""

    quantized: Tensor  # [..., C] fp32; gradients pass straight through to the latents
    codes: Tensor  # [..., D] int64
    commitment_loss: Tensor  # scalar fp32


class _StraightThrough(torch.autograd.Function):
    """Hand out ``quantized`` and the commitment loss as functions of the latents, in one node of the graph.

    All it keeps is the sum of the residuals over the depths, which is the loss's gradient up to ``scale``.
    The quantized latents leave untouched, where ``z + (z_q - z).detach()`` would round them.
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


class ResidualVQ(EMACodebooks):
    """Residual vector quantization: each depth codes what those before left over (arXiv 2203.01941, 3.1).

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
        num_codebooks = 1 if shared_codebook else num_quantizers
        super().__init__(num_codebooks, codebook_size, dim, num_quantizers, **kwargs)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize ``latents [..., C]``; in training mode also add to the window.

        The commitment loss is the mean over depths d of the mean squared distance between the latents and
        the sum of the first d code vectors; its gradient goes to the latents alone (arXiv 2203.01941, eq.
        8).

        Raises:
            ValueError: on latents of another width or with NaN or infinite values.
        """
        residual = self._flatten(latents, self.code_width)
        depth, learning = self.num_quantizers, self.training and not self.frozen
        codes = torch.empty(len(residual), depth, dtype=torch.int64, device=residual.device)
        quantized, residual_sum = torch.zeros_like(residual), torch.zeros_like(residual)
        loss = residual.new_zeros(())
        share = 1.0 / (depth * max(residual.numel(), 1))  # an empty batch has loss 0, not NaN
        inputs: list[Tensor] = []
        with torch.no_grad(), self._naming_latents(latents):
            for d, search in enumerate(self._searches()):
                codes[:, d] = search(residual)
                vectors = F.embedding(codes[:, d], self.codebook[d % self.num_codebooks])
                if learning:
                    inputs.append(residual)
                residual = residual - vectors  # never in place: the window still needs this depth's input
                quantized += vectors
                residual_sum += residual
                loss += residual.square().sum() * share
            if learning:
                self._accumulate(inputs, codes)
        quantized, loss = _StraightThrough.apply(
            latents,
            quantized.view(latents.shape),
            residual_sum.view(latents.shape),
            loss,
            2.0 * share,
        )
        return QuantizerOutput(quantized, codes.view(*latents.shape[:-1], depth), loss)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Return the codes ``[..., D]`` of ``latents [..., C]``, in any mode; the window stays as it is."""
        residual = self._flatten(latents, self.code_width)
        codes = []
        with self._naming_latents(latents):
            for d, search in enumerate(self._searches()):
                codes.append(search(residual))
                residual = residual - F.embedding(codes[d], self.codebook[d % self.num_codebooks])
        return torch.stack(codes, dim=1).view(*latents.shape[:-1], self.num_quantizers)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the latents ``[..., C]`` of ``codes [..., D]``, bit for bit those of the forward."""
        self._check_codes(codes)
        quantized = self.codebook.new_zeros(*codes.shape[:-1], self.code_width)
        for d in range(self.num_quantizers):
            quantized += F.embedding(codes[..., d], self.codebook[d % self.num_codebooks])
        return quantized

    def additive_codebooks(self) -> Tensor:
        """Return ``[Dc, K, C]`` such that the sum of one row per depth is the quantized latent."""
        return self.codebook


class MultiCodebookVQ(EMACodebooks):
    """Multi-codebook quantization: each of D chunks has its own codebook (arXiv 2502.20321, 3.2).

    Chunks and codes are l2-normalised, so a quantized chunk is a unit vector. UniTok learns the codebooks by
    gradient; here they follow moving averages like those of :class:`ResidualVQ`, normalised after every
    update.

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
        super().__init__(num_quantizers, codebook_size, dim // num_quantizers, num_quantizers, **kwargs)
        self.dim = dim

    def reset_codebook(self) -> None:
        """Draw directions uniformly and forget all averages."""
        super().reset_codebook()
        self.codebook.copy_(F.normalize(self.codebook, dim=-1))

    def _codes_from_averages(self) -> None:
        super()._codes_from_averages()
        self.codebook.copy_(F.normalize(self.codebook, dim=-1))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize ``latents [..., dim]``; in training mode also add to the window.

        The commitment loss is the mean squared distance between the normalised chunks and their codes.

        Raises:
            ValueError: on latents of another width or with NaN or infinite values.
        """
        codes = self.encode(latents)  # [..., D]
        chunks = self._chunks(latents)  # [N, D, C], with gradient
        rows = chunks.detach()
        with torch.no_grad():
            quantized = self._gather(codes).view(rows.shape)
            residual = rows - quantized
            share = 1.0 / max(rows.numel(), 1)  # an empty batch has loss 0, not NaN
            loss = residual.square().sum() * share
            if self.training and not self.frozen:
                self._accumulate(list(rows.unbind(dim=1)), codes.view(-1, self.num_quantizers))
        quantized, loss = _StraightThrough.apply(chunks, quantized, residual, loss, 2.0 * share)
        return QuantizerOutput(quantized.view(latents.shape), codes, loss)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Return the codes ``[..., D]`` of ``latents [..., dim]``; the window stays as it is in any mode."""
        self._flatten(latents, self.dim)
        rows = self._chunks(latents)
        with self._naming_latents(latents):
            codes = [search(rows[:, d].contiguous()) for d, search in enumerate(self._searches())]
        return torch.stack(codes, dim=1).view(*latents.shape[:-1], self.num_quantizers)

    def _chunks(self, latents: Tensor) -> Tensor:
        """Return the normalised chunks ``[N, D, C]`` of ``latents [..., dim]`` in fp32."""
        with torch.autocast(device_type=latents.device.type, enabled=False):
            return F.normalize(latents.float().reshape(-1, self.num_quantizers, self.code_width), dim=-1)

    def _gather(self, codes: Tensor) -> Tensor:
        """Return the code vectors ``[..., D, C]`` of ``codes [..., D]``."""
        vectors = [F.embedding(codes[..., d], self.codebook[d]) for d in range(self.num_quantizers)]
        return torch.stack(vectors, dim=-2)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the latents ``[..., dim]`` of ``codes [..., D]``, bit for bit those of the forward."""
        self._check_codes(codes)
        return self._gather(codes).flatten(-2)

    def additive_codebooks(self) -> Tensor:
        """Return ``[D, K, dim]``, each chunk's codes in their place among zeros: their sum is the latent."""
        depth, size, width = self.codebook.shape
        padded = self.codebook.new_zeros(depth, size, depth, width)
        for d in range(depth):
            padded[d, :, d] = self.codebook[d]
        return padded.flatten(-2)
