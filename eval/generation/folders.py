"""Pictures that lie in folders: finding and reading them."""

from pathlib import Path

import numpy as np

from data_pipeline.images.decoding import decode_rgb
from data_pipeline.images.header import BadImageError
from data_pipeline.shards.image_text_shards import IMAGE_EXTENSIONS
from eval.benchmark_files import BenchmarkError


def picture_files(folder: Path) -> list[Path]:
    """All pictures of a folder and of those below it, in the order of their names; hidden files are none.

    Raises:
        BenchmarkError: there are none.
    """
    if not folder.is_dir():
        raise BenchmarkError(f"no folder {folder}; expected one of pictures")
    paths = (path for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
    found = sorted(path for path in paths if not path.name.startswith(".") and path.is_file())
    if not found:
        raise BenchmarkError(f"{folder} has no pictures; expected {', '.join(sorted(IMAGE_EXTENSIONS))}")
    return found


def read_picture(path: Path) -> np.ndarray:
    """Decode a picture file to uint8 [H, W, 3], rotated by its EXIF, transparency laid on white.

    Raises:
        BenchmarkError: it is gone, or cannot be decoded.
    """
    try:
        return decode_rgb(path.read_bytes())
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}") from error
    except BadImageError as error:
        raise BenchmarkError(f"{path} {error}; is the file whole?") from error
