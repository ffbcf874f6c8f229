"""Code vectors on their way into the language model: frozen codebooks and the MLPs that embed them.

Shapes: N or V visual positions, Q codebooks (0 pixel, 1 semantic, if any), D depths, Dc codebooks per
vocabulary (1 if all depths share it, else D), K codes, E dimensions of a code vector, H width of the
decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

CODEBOOKS = ("pixel", "semantic")
"""Names of the codebooks, in the order of Q; a VQ model of others has the first alone."""


class Codebooks(nn.Module):
    """The frozen code vectors, in fp32 whatever happens to the rest of the model.

    `vectors` [Q, Dc, K, E] are stored as the visual tokenizer has them; what the model reads is scaled to
    unit mean square of the summed codes' leading part, so that its weights start at the right scale for any
    tokenizer.
    """

    def __init__(
        self, codebook_depths: int, codebook_size: int, codebook_dim: int, num_codebooks: int = 2
    ) -> None:
        super().__init__()
        # Converted, not created, as fp32: DeepSpeed's zero.Init turns created tensors into the training
        # precision.
        vectors = torch.zeros(num_codebooks, codebook_depths, codebook_size, codebook_dim).float()
        self.register_buffer("vectors", vectors)
        self.register_buffer("scale", torch.ones(num_codebooks).float())  # [Q]
        self.vectors: torch.Tensor
        self.scale: torch.Tensor

    def set(self, vectors: torch.Tensor) -> None:
        """Take over code vectors [Q, Dc, K, E]."""
        self.vectors = vectors.detach().to(self.vectors.device, torch.float32, copy=True)
        self.scale = self.vectors[:, 0].square().mean(dim=(1, 2)).clamp(min=1e-12).rsqrt()

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Look up codes [N, Q, D] -> [N, Q, D, E]."""
        _, depths, size, _ = self.vectors.shape
        books = torch.arange(codes.shape[1], device=codes.device)[:, None] * depths
        depth = torch.arange(codes.shape[2], device=codes.device).clamp(max=depths - 1)
        rows = (books + depth) * size + codes
        return self.vectors.flatten(0, 2)[rows] * self.scale[:, None, None]

    def look_up(self, book: int, depth: int, codes: torch.Tensor) -> torch.Tensor:
        """Look up the codes [N] of one codebook and depth -> [N, E]."""
        return self.vectors[book, min(depth, self.vectors.shape[1] - 1)][codes] * self.scale[book]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != torch.float32:
                setattr(self, name, before[name].float().to(buffer.device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.vectors, self.scale = self.vectors.float(), self.scale.float()
        super()._load_from_state_dict(*args, **kwargs)


class GeluMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_features, hidden_features)
        self.activation = nn.GELU()
        self.down = nn.Linear(hidden_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return self.down(self.activation(self.up(x.to(self.up.weight.dtype))))


class FeatureAdapter(GeluMLP):
    """Continuous features [n, C] -> inputs of the decoder [n, H]; of images in tiles, ends of rows too."""

    def __init__(self, feature_dim: int, hidden_size: int, ends_rows: bool) -> None:
        super().__init__(feature_dim, hidden_size, hidden_size)
        self.end_of_row = nn.Parameter(torch.empty(hidden_size)) if ends_rows else None

    def forward(self, features: torch.Tensor, is_end: torch.Tensor | None = None) -> torch.Tensor:
        """Map features; where a row ends ([n] bool), put the one learned vector, whatever is there."""
        adapted = super().forward(features)
        if self.end_of_row is None:
            return adapted
        if is_end is None:
            is_end = torch.zeros(len(adapted), dtype=torch.bool, device=adapted.device)
        return torch.where(is_end[:, None], self.end_of_row.to(adapted.dtype), adapted)


class VisualEmbedder(nn.Module):
    """Summed code vectors [V, Q, E] -> inputs of the decoder [V, H]; of `places` P, also by place.

    Those of the codebooks named by `read` are embedded.
    """

    def __init__(
        self, read: Sequence[str], embedder: str, codebook_dim: int, hidden_size: int, places: int = 0
    ) -> None:
        super().__init__()
        self.read = [CODEBOOKS.index(name) for name in read]
        self.joined = embedder == "concat_mlp" or len(self.read) == 1
        mlps, width = (1, len(self.read) * codebook_dim) if self.joined else (len(self.read), codebook_dim)
        if hidden_size % mlps:
            raise ValueError(f"embedder='mlp_concat' needs an even hidden_size, got {hidden_size}")
        self.mlps = nn.ModuleList(
            GeluMLP(width, hidden_size // mlps, hidden_size // mlps) for _ in range(mlps)
        )
        self.place_embedding = nn.Embedding(places, hidden_size) if places else None

    def forward(self, features: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Join the features that are read, before or after the MLPs; `places` [V] count from 0."""
        features = features[:, self.read]
        if self.joined:
            embedded = self.mlps[0](features.flatten(1))
        else:
            embedded = torch.cat([mlp(features[:, i]) for i, mlp in enumerate(self.mlps)], dim=-1)
        if self.place_embedding is None:
            return embedded
        return embedded + self.place_embedding(places)
