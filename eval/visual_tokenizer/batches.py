"""Batches of decoded pictures, cut over ranks so that figures do not depend on how many ranks there are."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from data_pipeline.images.decoding import ImageDecoder, build_image_decoder
from eval.progress import with_progress
from eval.visual_tokenizer.pictures import PictureSet

Fit = Literal["center_crop", "square"]
FITS: dict[str, str] = {
    "center_crop": "short side resized to the model's (PIL, bicubic), then the centre: the papers' protocol",
    "square": "whole picture resized to a square, bicubic: as in training here",
}
THREADS = 4  # decode; one more reads ahead
MAX_PIXELS = 1 << 28  # collections hold larger pictures than training wants


@dataclass(frozen=True)
class Share:
    """Which batches are this rank's: every `world_size`-th."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank {self.rank} of {self.world_size}; expected a rank from 0 to {self.world_size - 1}"
            )


@dataclass(frozen=True)
class PictureBatch:
    """Decoded pictures and their numbers in their set."""

    numbers: range
    images: Tensor  # [B, 3, S, S] in [-1, 1]


class CentreCropDecoder(ImageDecoder):
    """Resizes the short side and takes the centre, as torchvision's Resize and CenterCrop do."""

    def _fit_pixels(self, pixels: np.ndarray) -> Tensor:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        image = transforms.resize(image, self.image_size, InterpolationMode.BICUBIC)
        return torch.from_numpy(np.array(transforms.center_crop(image, self.image_size)))


def build_decoder(image_size: int, fit: Fit) -> ImageDecoder:
    """The decoder for a way to fit pictures into the model's square.

    Raises:
        ValueError: there is no such way.
    """
    if fit == "square":
        return build_image_decoder(image_size, max_pixels=MAX_PIXELS, num_threads=THREADS)
    if fit == "center_crop":
        return CentreCropDecoder(image_size, torch.device("cpu"), "resize", MAX_PIXELS, THREADS)
    raise ValueError(f"fit is {fit!r}; expected one of {', '.join(FITS)}")


def read_batch(pictures: PictureSet, numbers: range | list[int], decode: ImageDecoder) -> Tensor:
    """Decoded pictures [B, 3, S, S] in [-1, 1].

    Raises:
        ValueError: one cannot be decoded; the message names its file.
    """
    chosen = [pictures.pictures[number] for number in numbers]
    decoded = decode([picture.place.read() for picture in chosen])
    if decoded.rejected:
        bad = decoded.rejected[0]
        raise ValueError(f"{chosen[bad.index].where}: not a picture that can be measured: {bad.reason}")
    return decoded.images


def iterate_batches(
    pictures: PictureSet, image_size: int, batch_size: int, fit: Fit, share: Share, what: str
) -> Iterator[PictureBatch]:
    """This rank's batches of a set, the next one decoded while one is in use.

    Ranks take whole batches in turn: a batch holds the same pictures for any number of ranks, and the last
    digits of a network's output depend on its batch.

    Raises:
        ValueError: a picture cannot be decoded; the message names its file.
    """
    decode = build_decoder(image_size, fit)
    parts = [range(at, min(at + batch_size, len(pictures))) for at in range(0, len(pictures), batch_size)]
    mine = parts[share.rank :: share.world_size]
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(read_batch, pictures, numbers, decode) for numbers in mine[:1]]
        for index, numbers in enumerate(with_progress(mine, what)):
            images = ahead.pop().result()
            ahead += [
                reader.submit(read_batch, pictures, after, decode) for after in mine[index + 1 : index + 2]
            ]
            yield PictureBatch(numbers, images)
