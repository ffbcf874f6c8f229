"""Encoded images -> normalised batches by DALI, torchvision or PIL; a bad image costs only itself.

All backends give the same pixels within a few 255ths: EXIF rotation applied, transparency laid on white,
grey and CMYK made RGB, bicubic resize with antialias in uint8, then [-1, 1]. Shapes: N images, S image size.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.images.header import BadImageError, ImageHeader, read_header, without_metadata
from dualtoken.pictures import as_rgb
from dualtoken.unified_model.tiles import Tiles

logger = logging.getLogger(__name__)

Backend = Literal["auto", "dali", "torchvision", "pil"]
Fit = Literal["resize", "crop"]
DEFAULT_MAX_PIXELS = 1 << 26
"""67 million pixels, 200 MB decoded: above what cameras give, below what exhausts a worker."""

_CACHED_BYTES = 1 << 18  # of pixels that are normalised together


@dataclass(frozen=True)
class Rejected:
    """An image that could not be decoded: its place in the input and the reason."""

    index: int
    reason: str


@dataclass
class DecodedImages:
    """The images that could be decoded, in input order, and the ones that could not."""

    images: Tensor
    """float32 [N, 3, S, S] in [-1, 1], on the decoder's device."""
    kept: list[int]
    """Place in the input of every image."""
    rejected: list[Rejected] = field(default_factory=list)
    tiles: list[Tensor] = field(default_factory=list)
    """Of every image, for a decoder that cuts `Tiles`: uint8 [R K, 3, S, S], on the CPU."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Height and width of every image that tiles were cut of, before it was resized."""
    ready: torch.cuda.Event | None = None
    """Set on a GPU by a `SideDecoder`: when the images are there."""

    def for_current_stream(self) -> Tensor:
        """Return the images for what the caller's CUDA stream is given next; the host does not wait."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.images.device)
            stream.wait_event(self.ready)
            self.images.record_stream(stream)
        return self.images


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode one image with PIL, the reference: uint8 [H, W, 3], rotated by its EXIF, transparency on white.

    Raises:
        BadImageError: it cannot be decoded to its end.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(without_metadata(data))) as file:
            file.load()
            return np.array(as_rgb(file))
    except Exception as error:  # PIL's plugins raise anything from OSError to SyntaxError and struct.error
        raise BadImageError(f"cannot be decoded: {' '.join(str(error).split())[:200]}") from error


class ImageDecoder:
    """Decodes lists of encoded images with PIL; the parent of the faster backends.

    A subclass decodes what it is good at, many together in `_decode_together` or one in `_decode_alone`;
    everything else, and every image that it fails on, goes through PIL, and only what PIL cannot decode
    either is rejected. Images are normalised into their place in the batch as soon as a few are decoded,
    while they are in the cache and their memory can be used for the next.
    """

    name = "PIL"

    def __init__(
        self,
        image_size: int,
        device: torch.device,
        fit: Fit,
        max_pixels: int,
        num_threads: int,
        tiles: Tiles | None = None,
    ) -> None:
        self.image_size, self.fit, self.max_pixels, self.tiles = image_size, fit, max_pixels, tiles
        self.device, self.num_threads = device, num_threads
        self._threads = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    def describe(self) -> str:
        """The choice in words, for the log."""
        shape = "resized" if self.fit == "resize" else "centre crop, resized"
        threads = f"{self.num_threads} thread{'s' * (self.num_threads > 1)}"
        size = f"{shape} to {self.image_size} px, bicubic{'' if self.tiles is None else ', and in tiles'}"
        return f"images decoded by {self.name} ({threads}) for {self.device}, {size}"

    def __call__(self, encoded: Sequence[bytes]) -> DecodedImages:
        """Decode a list of encoded images.

        Returns:
            The images that could be decoded, [N, 3, S, S], and the others with their reasons; a bad image
            never raises.
        """
        rejected: list[Rejected] = []
        headers: dict[int, ImageHeader] = {}
        for index, data in enumerate(encoded):
            try:
                headers[index] = read_header(data, self.max_pixels)
            except BadImageError as error:
                rejected.append(Rejected(index, str(error)))
        slots = {index: slot for slot, index in enumerate(headers)}
        images = torch.empty(len(slots), 3, self.image_size, self.image_size, device=self.device)
        done = self._decode_together(encoded, headers, images)
        tiles: dict[int, Tensor] = {}
        sizes: dict[int, tuple[int, int]] = {}
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

        def decode(indices: list[int]) -> dict[int, BadImageError]:
            pixels, bad = {}, {}
            for index in indices:
                try:
                    whole = self._decode_alone(encoded[index], headers[index])
                    pixels[slots[index]] = self._fit_pixels(whole)
                    if self.tiles is not None:
                        used = self._cropped(whole)
                        tiles[index] = self.tiles.cut(used, self._resized)
                        sizes[index] = int(used.shape[0]), int(used.shape[1])
                except BadImageError as error:
                    bad[index] = error
            # Each thread has a current stream of its own.
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                self._normalise(pixels, images)
            return bad

        alone = [index for index in headers if index not in done]
        at_a_time = max(1, _CACHED_BYTES // (3 * self.image_size**2))
        groups = [alone[at : at + at_a_time] for at in range(0, len(alone), at_a_time)]
        bad = {index: error for group in self._map(decode, groups) for index, error in group.items()}
        rejected += [Rejected(index, str(error)) for index, error in bad.items()]
        rejected.sort(key=lambda one: one.index)
        kept = [index for index in headers if index not in bad]
        for place, index in enumerate(kept if bad else ()):  # moved up in place: new memory costs more
            if place != slots[index]:
                images[place] = images[slots[index]]
        images = images[: len(kept)]
        in_tiles = [] if self.tiles is None else kept
        return DecodedImages(
            images, kept, rejected, [tiles[index] for index in in_tiles], [sizes[index] for index in in_tiles]
        )

    def _decode_together(
        self, encoded: Sequence[bytes], headers: dict[int, ImageHeader], images: Tensor
    ) -> set[int]:
        """Decode many at a time into `images` [n, 3, S, S], the order of `headers`; return which ones."""
        return set()

    def _decode_alone(self, data: bytes, header: ImageHeader) -> np.ndarray | Tensor:
        """Decode one image to uint8 [H, W, 3]; BadImageError if that cannot be."""
        return decode_rgb(data)

    @staticmethod
    def _normalise(pixels: dict[int, Tensor], images: Tensor) -> None:
        """Bring uint8 [S, S, 3] to [-1, 1] in `images` [n, 3, S, S], by their places there, in order."""
        places = list(pixels)
        if places and len(places) == places[-1] - places[0] + 1:
            whole = torch.stack(list(pixels.values())) if len(places) > 1 else pixels[places[0]][None]
            normalise(whole, images[places[0] : places[-1] + 1])
            return
        for place, image in pixels.items():
            normalise(image[None], images[place : place + 1])

    def _map(self, function: Callable[[list[int]], Any], items: list[list[int]]) -> list[Any]:
        if self._threads is None or len(items) < 2:
            return [function(item) for item in items]
        return list(self._threads.map(function, items))

    def _fit_pixels(self, pixels: np.ndarray | Tensor) -> Tensor:
        """Crop and resize uint8 [H, W, 3] to [S, S, 3]."""
        return self._resized(self._cropped(pixels), self.image_size, self.image_size)

    def _cropped(self, pixels: Any) -> Any:
        """What is used of a picture [H, W, 3]."""
        return _centre_square(pixels) if self.fit == "crop" else pixels

    def _resized(self, pixels: np.ndarray | Tensor, height: int, width: int) -> Tensor:
        """Resize uint8 [H, W, 3] with PIL."""
        from PIL import Image

        pixels = np.asarray(pixels)
        if pixels.shape[:2] != (height, width):
            image = Image.fromarray(np.ascontiguousarray(pixels))
            pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels)


def normalise(pixels: Tensor, out: Tensor) -> None:
    """Bring uint8 [n, S, S, 3] to [-1, 1] in `out` [n, 3, S, S]."""
    pixels = pixels.to(out.device, non_blocking=True)  # as bytes: a quarter of what floats would take
    out.copy_(pixels.permute(0, 3, 1, 2)).div_(127.5).sub_(1)


def _centre_square(pixels: Any) -> Any:
    """The largest centred square of [H, W, 3]; array or tensor."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


class SideDecoder:
    """Decodes in a thread beside the one that computes: on a GPU on a CUDA stream of its own.

    There the images have to be taken by `for_current_stream`.
    """

    def __init__(self, decoder: Callable[[Sequence[bytes]], DecodedImages]) -> None:
        """Decode with `decoder`, which nothing else uses meanwhile."""
        self.decoder = decoder
        device = getattr(decoder, "device", torch.device("cpu"))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, encoded: Sequence[bytes]) -> DecodedImages:
        """Decode a list of encoded images; in no more than one thread at a time."""
        if self._stream is None:
            return self.decoder(encoded)
        with torch.cuda.stream(self._stream):
            decoded = self.decoder(encoded)
            decoded.ready = self._stream.record_event()
        return decoded


class TorchvisionDecoder(ImageDecoder):
    """Decodes JPEG and plain WebP with torchvision and resizes with torch: the fastest robust way on a CPU.

    PNG goes to PIL: `decode_png` of torchvision 0.29 ends the process on damaged data (a segmentation fault
    after a few random bytes).
    """

    name = "torchvision (JPEG, WebP) and PIL (PNG)"

    def _decode_alone(self, data: bytes, header: ImageHeader) -> np.ndarray | Tensor:
        from torchvision.io import ImageReadMode, decode_image

        if header.special or header.format not in ("JPEG", "WEBP"):
            return super()._decode_alone(data, header)
        try:
            # A bytearray since torch wants memory it could write to.
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_image(raw, ImageReadMode.RGB, apply_exif_orientation=True)  # [3, H, W]
        except (RuntimeError, ValueError):
            return super()._decode_alone(data, header)
        return image.permute(1, 2, 0)

    def _resized(self, pixels: np.ndarray | Tensor, height: int, width: int) -> Tensor:
        """Resize uint8 [H, W, 3] with torch."""
        pixels = torch.as_tensor(pixels)
        if pixels.shape[:2] != (height, width):
            planes = pixels.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
            planes = torch.nn.functional.interpolate(
                planes, size=(height, width), mode="bicubic", antialias=True
            )
            pixels = planes[0].permute(1, 2, 0)
        return pixels


def build_image_decoder(
    image_size: int,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
    fit: Fit = "resize",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    num_threads: int = 1,
    tiles: Tiles | None = None,
) -> ImageDecoder:
    """Choose and build a decoder: a callable from a list of encoded images to `DecodedImages`.

    `auto` is DALI with `mixed` decoding for a CUDA device, and torchvision for the CPU, where it is faster
    than DALI both on small PNGs and on photographs (`benchmarks/decoding.py`), and for tiles, which DALI does
    not cut.

    Args:
        image_size: side S of the square result in pixels.
        backend: `auto`, `dali`, `torchvision` or `pil` (the slow reference).
        device: where the result is to be.
        fit: `resize` squeezes the whole picture into the square, `crop` takes its largest centred square.
        max_pixels: pictures with more pixels are rejected unseen.
        num_threads: threads that decode.
        tiles: how pictures are cut into tiles besides; those of the cropped square with `crop`.

    Raises:
        ValueError: an argument is out of range.
        ImportError: the backend is not installed.
    """
    device = torch.device(device)
    if image_size < 1 or max_pixels < 1 or num_threads < 1:
        raise ValueError(
            f"image_size {image_size}, max_pixels {max_pixels}, num_threads {num_threads}: expected 1 or more"
        )
    if tiles is not None and tiles.size != image_size:
        raise ValueError(f"tiles of {tiles.size} pixels a side, images of {image_size}; expected one size")
    if fit not in ("resize", "crop"):
        raise ValueError(f"fit is {fit!r}, expected 'resize' or 'crop'")
    if backend == "auto":
        backend = "dali" if device.type == "cuda" and tiles is None else "torchvision"
    classes = {"torchvision": TorchvisionDecoder, "pil": ImageDecoder}
    if backend == "dali" and tiles is not None:
        raise ValueError("backend dali does not cut pictures into tiles; expected auto, torchvision or pil")
    if backend == "dali":
        from data_pipeline.images.dali import DaliDecoder  # which builds on those here

        classes["dali"] = DaliDecoder
    if backend not in classes:
        raise ValueError(f"image decoding backend is {backend!r}, expected auto, dali, {', '.join(classes)}")
    return classes[backend](image_size, device, fit, max_pixels, num_threads, tiles)
