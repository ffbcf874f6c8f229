"""Pictures as the 8-bit files that a Fréchet distance compares: as PNG, or as the released code has them."""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.metrics.images import to_unit_range

JPEG_QUALITY = 95  # OpenCV's default, with chroma at half resolution


def as_png(images: Tensor) -> np.ndarray:
    """Pictures [B, 3, H, W] in about [-1, 1] clamped and rounded: uint8 [B, H, W, 3], as PNG keeps them."""
    pixels = (to_unit_range(images) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def as_reference(images: Tensor) -> np.ndarray:
    """Pictures as DualToken's released evaluation has them: values cut off, then written and read as JPEG.

    Both originals and reconstructions go through it there, so a distance by it compares JPEGs with JPEGs.
    """
    pixels = ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    files = []
    for picture in pixels.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
        files.append(np.array(Image.open(file)))
    return np.stack(files)


SAVED: dict[str, Callable[[Tensor], np.ndarray]] = {"png": as_png, "reference": as_reference}
SAVED_WORDS = {
    "png": "rounded to 8 bits, as PNG",
    "reference": f"cut off to 8 bits, JPEG of quality {JPEG_QUALITY}, as the released code",
}
