"""What the language model reads of an image besides code vectors: causal post-quantization features.

The visual tokenizer's projections behind its quantizers turn an image's latents (summed code vectors) into
features of the tower's width, which the semantic branch learned to be those of the original tower. Their
attention is causal, so the feature of a position depends on no later one and can be computed while an image
is being generated.

Shapes: I images, N positions, Q = 2 codebooks (0 pixel, 1 semantic), E dimensions of a code vector, W width
of the tower.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dualtoken.projection import AttentionProjection, KeyValueCache
from dualtoken.unified_model.visual_embedder import CODEBOOKS


@dataclass
class FeatureCache:
    """Keys and values of the positions done so far of images that are being generated, by codebook."""

    projections: list[KeyValueCache] = field(default_factory=lambda: [KeyValueCache() for _ in CODEBOOKS])


class PostQuantization(nn.Module):
    """The visual tokenizer's causal projections, frozen: latents [I, N, Q, E] -> features [I, N, Q, W].

    Features are scaled to unit mean square per position, so that the embedder's weights start at the right
    scale for any tokenizer.
    """

    is_set: torch.Tensor

    def __init__(self, codebook_dim: int, width: int) -> None:
        super().__init__()
        self.pixel = AttentionProjection(codebook_dim, width, causal=True)
        self.semantic = AttentionProjection(codebook_dim, width, causal=True)
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool))
        self.requires_grad_(False)

    def set(self, pixel: AttentionProjection, semantic: AttentionProjection) -> None:
        """Take over the weights of the visual tokenizer's projections.

        Raises:
            ValueError: their attention is not causal, or they map other widths than the config says.
        """
        for name, own, given in (("pixel", self.pixel, pixel), ("semantic", self.semantic, semantic)):
            if not given.attn.causal:
                raise ValueError(
                    f"the visual tokenizer's {name} projection behind the quantizer sees the whole image, "
                    "which is not there yet while it is generated; use visual_features='code_vectors', or a "
                    "tokenizer trained with causal_post_quantization=True"
                )
            widths, expected = (
                (projection.proj.in_features, projection.proj.out_features) for projection in (given, own)
            )
            if widths != expected:
                raise ValueError(
                    f"the visual tokenizer's {name} projection maps {widths[0]} to {widths[1]} features, the "
                    f"config asks for {expected[0]} to {expected[1]}; build the config with "
                    "DualTokenConfig.for_tokenizers"
                )
            own.load_state_dict(given.state_dict())
        self.is_set.fill_(True)

    @torch.no_grad()
    def forward(self, latents: torch.Tensor, cache: FeatureCache | None = None) -> torch.Tensor:
        """Compute the features of whole images, or of the next position(s) of those in the cache."""
        caches = cache.projections if cache is not None else [None] * len(CODEBOOKS)
        projections = (self.pixel, self.semantic)
        features = [projection(latents[:, :, q], caches[q]) for q, projection in enumerate(projections)]
        return torch.stack([F.rms_norm(f, f.shape[-1:], eps=1e-6) for f in features], dim=2)


def require_whole_images(positions: torch.Tensor, per_image: int) -> None:
    """Raise ValueError unless the places [V] of the image-pad tokens come in runs of an image each."""
    whole = len(positions) % per_image == 0
    if whole:
        runs = positions.view(-1, per_image)
        whole = bool((runs[:, -1] - runs[:, 0] == per_image - 1).all())
    if not whole:
        raise ValueError(
            f"{len(positions)} image-pad tokens do not come in runs of {per_image}, an image each; "
            "post-quantization features and places need whole images: do not cut documents inside one"
        )
