"""Convolutional decoder from a grid of latents to an image (layout of taming-transformers and RQ-VAE)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm of 32 groups, or of as many as divide a narrow decoder's channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut; the first is ``first_kernel`` wide."""

    def __init__(self, in_channels: int, out_channels: int, first_kernel: int = 3) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, first_kernel, padding=first_kernel // 2)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H, W]``."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + hidden


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, C, H, W]``."""
        normed = self.norm(x)
        q, k, v = (f(normed).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, HW, C]
        attended = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, C, 2H, 2W]``."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MiddleBlock(GradientCheckpointingLayer):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, C, H, W]``."""
        return self.block_2(self.attn_1(self.block_1(x)))


class UpLevel(GradientCheckpointingLayer):
    """The residual blocks (and attention) of one resolution, and the way up to the next."""

    def __init__(self, channels: Sequence[int], with_attention: bool, with_upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(channels[:-1], channels[1:]))
        self.attn = nn.ModuleList(SpatialAttention(b) for b in channels[1:] if with_attention)
        if with_upsample:
            self.upsample = Upsample(channels[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, C', 2H, 2W]``, or ``[B, C', H, W]`` at the last level."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class PixelDecoder(nn.Module):
    """Decode latents ``[B, C, h, w]`` to images ``[B, 3, H, W]``.

    Each level but the last doubles the resolution: ``H = h * 2 ** (len(multipliers) - 1) * pixel_shuffle``.

    Args:
        in_channels: channels of the latents.
        channels: width at full resolution, before the multipliers.
        multipliers: width factor per level, full resolution first.
        num_res_blocks: each level has one more than this, as in the released models.
        attention_resolutions: heights of the levels that get attention.
        latent_size: height of the latents.
        pixel_shuffle: pixels a side that each position of the last level paints (sub-pixel convolution, arXiv
            1609.05158); 1 in the released models. 2 saves the level at full resolution, most of a small
            decoder.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        latent_size: int,
        pixel_shuffle: int = 1,
    ) -> None:
        super().__init__()
        self.pixel_shuffle = pixel_shuffle
        widths = [channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = MiddleBlock(widths[-1])
        levels: list[UpLevel] = []
        width_in, resolution = widths[-1], latent_size
        for width in reversed(widths):
            level_widths = [width_in] + [width] * (num_res_blocks + 1)
            last = len(levels) == len(widths) - 1
            levels.append(UpLevel(level_widths, resolution in attention_resolutions, not last))
            width_in, resolution = width, resolution * 2
        self.up = nn.ModuleList(reversed(levels))  # up[0] is the full resolution, as in the released layout
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * pixel_shuffle**2, 3, padding=1)

    def features(self, latents: Tensor) -> Tensor:
        """Return what the last convolution reads, ``[B, channels, H, W]``."""
        hidden = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden = level(hidden)
        return F.silu(self.norm_out(hidden))

    def paint(self, features: Tensor) -> Tensor:
        """Return images ``[B, 3, H, W]``, about [-1, 1], not clamped, of what :meth:`features` returned."""
        return F.pixel_shuffle(self.conv_out(features), self.pixel_shuffle)

    def forward(self, latents: Tensor) -> Tensor:
        """Return images ``[B, 3, H, W]``, about [-1, 1], not clamped."""
        return self.paint(self.features(latents))
