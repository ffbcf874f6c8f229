"""How alike two pictures are: PSNR and SSIM, as pure functions of tensors."""

import torch
from torch import Tensor

PSNR_EPSILON = 1e-8  # identical pictures give 80 dB
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def to_unit_range(images: Tensor) -> Tensor:
    """Map pictures in about [-1, 1] to [0, 1], clamped, fp32."""
    return ((images.float() + 1) / 2).clamp(0, 1)


def _check_pair(images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape or images.ndim != 4:
        raise ValueError(
            f"got pictures of shape {tuple(images.shape)} and references of shape {tuple(references.shape)}; "
            "expected two equal shapes [B, C, H, W]"
        )


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB: 10 log10(1 / (mse + 1e-8)).

    Args:
        images: [B, C, H, W] in [0, 1].
        references: the same shape and range.

    Returns:
        [B], float64.

    Raises:
        ValueError: the shapes differ.
    """
    _check_pair(images, references)
    error = (images.double() - references.double()).square().mean(dim=(1, 2, 3))  # [B]
    return 10 * torch.log10(1 / (error + PSNR_EPSILON))


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each picture, mean over channels and valid positions.

    An 11 x 11 Gaussian window (sigma 1.5) without padding, K1 = 0.01, K2 = 0.03, population
    covariances (Wang et al. 2004). Negative values stay negative.

    Args:
        images: [B, C, H, W] in [0, 1], H and W at least 11.
        references: the same shape and range.

    Returns:
        [B], float64.

    Raises:
        ValueError: the shapes differ, or a side is shorter than the window.
    """
    _check_pair(images, references)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"got pictures of {tuple(images.shape[-2:])} pixels; SSIM needs at least {SSIM_WINDOW} each way"
        )
    # One by one: the fp64 planes of one picture stay in a CPU's cache, which takes half the time.
    return torch.stack([_ssim(one.double(), other.double()) for one, other in zip(images, references)])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of two pictures [C, H, W], float64: a scalar."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = (window / window.sum()).tolist()

    def slide(values: Tensor, dim: int) -> Tensor:
        length = values.shape[dim] - SSIM_WINDOW + 1
        return sum(weight * values.narrow(dim, i, length) for i, weight in enumerate(weights))

    def blur(values: Tensor) -> Tensor:  # faster than a grouped convolution in fp64
        return slide(slide(values, 2), 1)

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x**2
    variance_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * structure).mean()
