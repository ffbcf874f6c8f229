"""What of a picture models see: RGB, the right way up, on white."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a PIL image of any kind as RGB: turned as its EXIF says, with transparency shown as white."""
    from PIL import Image

    image = _upright(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # PIL's own conversion clips 16-bit grey at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF says; damaged EXIF says nothing, as to other decoders.

    PIL's `exif_transpose` also writes the EXIF anew, and so fails on some that can be read.
    """
    from PIL import Image

    try:
        orientation: Any = image.getexif().get(0x0112)
    except Exception:  # PIL raises anything, from SyntaxError to struct.error
        return image
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)
