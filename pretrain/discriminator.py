"""PatchGAN discriminator of the tokenizer's adversarial loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class DiscriminatorConfig:
    """Size of the discriminator; the defaults are those of the released DualToken code."""

    channels: int = 64
    num_layers: int = 3
    kernel_size: int = 3
    max_channels: int = 512


class DownsamplingBlock(nn.Module):
    """Residual block with group norm that halves height and width."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        padding = kernel_size // 2
        self.norm1 = nn.GroupNorm(num_groups(in_channels), in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size, stride=2, padding=padding)
        self.norm2 = nn.GroupNorm(num_groups(out_channels), out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size, padding=padding)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H/2, W/2]
        """Return the block's output, half as high and wide."""
        h = self.conv1(F.leaky_relu(self.norm1(x), 0.2))
        h = self.conv2(F.leaky_relu(self.norm2(h), 0.2))
        return h + self.shortcut(F.avg_pool2d(x, 2))


class PatchDiscriminator(nn.Module):
    """Fully convolutional discriminator with one logit per patch (PatchGAN, arXiv 1611.07004)."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        widths = [min(config.channels * 2**i, config.max_channels) for i in range(config.num_layers + 1)]
        padding = config.kernel_size // 2
        self.conv_in = nn.Conv2d(3, widths[0], config.kernel_size, padding=padding)
        self.blocks = nn.ModuleList(
            DownsamplingBlock(a, b, config.kernel_size) for a, b in zip(widths[:-1], widths[1:])
        )
        self.norm_out = nn.GroupNorm(num_groups(widths[-1]), widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 1, config.kernel_size, padding=padding)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, 1, H / 2^n, W / 2^n]``, positive for real, of images ``[B, 3, H, W]``."""
        h = self.conv_in(images.to(self.conv_in.weight.dtype))
        for block in self.blocks:
            h = block(h)
        return self.conv_out(F.leaky_relu(self.norm_out(h), 0.2))


def num_groups(channels: int) -> int:
    """Return the number of group-norm groups: 32, or fewer where the width does not allow it."""
    fitting = (groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0 and channels >= 2 * groups)
    return next(fitting, 1)
