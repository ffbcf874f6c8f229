"""Encoded images -> normalised batches by DALI, torchvision or PIL; a bad image costs only itself.

All backends give the same pixels within a few 255ths: EXIF rotation applied, transparency laid on white,
grey and CMYK made RGB, bicubic resize with antialias in uint8, then [-1, 1]. Shapes: N images, S image size.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.images.header import BadImageError, ImageHeader, read_header

logger = logging.getLogger(__name__)

Backend = Literal["auto", "dali", "torchvision", "pil"]
Fit = Literal["resize", "crop"]
DEFAULT_MAX_PIXELS = 1 << 26
"""67 million pixels, 200 MB decoded: above what cameras give, below what exhausts a worker."""

_CACHED_BYTES = 1 << 18  # of pixels that are normalised together
_PIXELS_TOGETHER = 1 << 27  # of images that DALI decodes together: 400 MB decoded


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


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode one image with PIL, the reference: uint8 [H, W, 3], rotated by its EXIF, transparency on white.

    Raises:
        BadImageError: it cannot be decoded to its end.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image: Image.Image = file
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
            if image.mode in ("I;16", "I;16B", "I;16L", "I"):
                # PIL's own conversion clips 16-bit grey at 255.
                grey = np.asarray(image).astype(np.uint32) >> 8
                return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
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
        self, image_size: int, device: torch.device, fit: Fit, max_pixels: int, num_threads: int
    ) -> None:
        self.image_size, self.fit, self.max_pixels = image_size, fit, max_pixels
        self.device, self.num_threads = device, num_threads
        self._threads = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    def describe(self) -> str:
        """The choice in words, for the log."""
        shape = "resized" if self.fit == "resize" else "centre crop, resized"
        threads = f"{self.num_threads} thread{'s' * (self.num_threads > 1)}"
        size = f"{shape} to {self.image_size} px, bicubic"
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

        def decode(indices: list[int]) -> dict[int, BadImageError]:
            pixels, bad = {}, {}
            for index in indices:
                try:
                    pixels[slots[index]] = self._decode_alone(encoded[index], headers[index])
                except BadImageError as error:
                    bad[index] = error
            self._normalise(pixels, images)
            return bad

        alone = [index for index in headers if index not in done]
        at_a_time = max(1, _CACHED_BYTES // (3 * self.image_size**2))
        groups = [alone[at : at + at_a_time] for at in range(0, len(alone), at_a_time)]
        bad = {index: error for group in self._map(decode, groups) for index, error in group.items()}
        rejected += [Rejected(index, str(error)) for index, error in bad.items()]
        rejected.sort(key=lambda one: one.index)
        kept = [index for index in headers if index not in bad]
        if bad:
            images = images[torch.tensor([slots[index] for index in kept], dtype=torch.long).to(self.device)]
        return DecodedImages(images, kept, rejected)

    def _decode_together(
        self, encoded: Sequence[bytes], headers: dict[int, ImageHeader], images: Tensor
    ) -> set[int]:
        """Decode many at a time into `images` [n, 3, S, S], the order of `headers`; return which ones."""
        return set()

    def _decode_alone(self, data: bytes, header: ImageHeader) -> Tensor:
        """Decode one image to uint8 [S, S, 3]; BadImageError if that cannot be."""
        return self._fit_pixels(decode_rgb(data))

    @staticmethod
    def _normalise(pixels: dict[int, Tensor], images: Tensor) -> None:
        """Bring uint8 [S, S, 3] to [-1, 1] in `images` [n, 3, S, S], by their places there, in order."""
        places = list(pixels)
        if places and len(places) == places[-1] - places[0] + 1:
            whole = torch.stack(list(pixels.values())) if len(places) > 1 else pixels[places[0]][None]
            _normalise(whole, images[places[0] : places[-1] + 1])
            return
        for place, image in pixels.items():
            _normalise(image[None], images[place : place + 1])

    def _map(self, function: Callable[[list[int]], Any], items: list[list[int]]) -> list[Any]:
        if self._threads is None or len(items) < 2:
            return [function(item) for item in items]
        return list(self._threads.map(function, items))

    def _fit_pixels(self, pixels: np.ndarray) -> Tensor:
        """Crop and resize uint8 [H, W, 3] to [S, S, 3] with PIL."""
        from PIL import Image

        size = self.image_size
        if self.fit == "crop":
            pixels = _centre_square(pixels)
        if pixels.shape[:2] != (size, size):
            image = Image.fromarray(np.ascontiguousarray(pixels))
            pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels)


def _normalise(pixels: Tensor, out: Tensor) -> None:
    """Bring uint8 [n, S, S, 3] to [-1, 1] in `out` [n, 3, S, S]."""
    pixels = pixels.to(out.device, non_blocking=True)  # as bytes: a quarter of what floats would take
    out.copy_(pixels.permute(0, 3, 1, 2)).div_(127.5).sub_(1)


def _centre_square(pixels: Any) -> Any:
    """The largest centred square of [H, W, 3]; array or tensor."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


class TorchvisionDecoder(ImageDecoder):
    """Decodes JPEG and plain WebP with torchvision and resizes with torch: the fastest robust way on a CPU.

    PNG goes to PIL: `decode_png` of torchvision 0.29 ends the process on damaged data (a segmentation fault
    after a few random bytes).
    """

    name = "torchvision (JPEG, WebP) and PIL (PNG)"

    def _decode_alone(self, data: bytes, header: ImageHeader) -> Tensor:
        from torchvision.io import ImageReadMode, decode_image

        if header.special or header.format not in ("JPEG", "WEBP"):
            return super()._decode_alone(data, header)
        try:
            # A bytearray since torch wants memory it could write to.
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_image(raw, ImageReadMode.RGB, apply_exif_orientation=True)  # [3, H, W]
        except (RuntimeError, ValueError):
            return super()._decode_alone(data, header)
        return self._resize(image.permute(1, 2, 0))

    def _fit_pixels(self, pixels: np.ndarray) -> Tensor:
        return self._resize(torch.from_numpy(pixels))

    def _resize(self, pixels: Tensor) -> Tensor:
        """Crop and resize uint8 [H, W, 3] to [S, S, 3] with torch."""
        size = self.image_size
        if self.fit == "crop":
            pixels = _centre_square(pixels)
        if pixels.shape[:2] != (size, size):
            planes = pixels.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
            planes = torch.nn.functional.interpolate(
                planes, size=(size, size), mode="bicubic", antialias=True
            )
            pixels = planes[0].permute(1, 2, 0)
        return pixels


class DaliDecoder(TorchvisionDecoder):
    """Decodes and resizes with DALI: on a GPU `mixed` (nvJPEG), else its CPU operators.

    Batches are cut where their images have too many pixels, by their headers, to be decoded at a time.
    A pipeline is no longer valid after an image it cannot decode; it is then built again without that image.
    Images with transparency, 16 bits or extended WebP go to PIL and torch. The GPU path has not been run: it
    was written without a GPU at hand.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
            raise ImportError(
                "backend dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or the build for your CUDA)"
            )
        self.on_gpu = self.device.type == "cuda"
        self.name = f"DALI ({'mixed' if self.on_gpu else 'CPU'})"
        self._pipeline: Any = None
        self._capacity = 32

    def _takes(self, header: ImageHeader) -> bool:
        return header.format in ("JPEG", "PNG", "WEBP") and not header.special

    def _build(self) -> Any:
        dali: Any = import_module("nvidia.dali")
        fn, types = dali.fn, dali.types
        device_id = None
        if self.on_gpu:
            device_id = torch.cuda.current_device() if self.device.index is None else self.device.index
        pipeline = dali.Pipeline(
            batch_size=self._capacity,
            num_threads=self.num_threads,
            device_id=device_id,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(
                encoded,
                device="mixed" if self.on_gpu else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,
            )
            if self.fit == "crop":
                side = fn.external_source(name="side", device="cpu", dtype=types.FLOAT, ndim=0)
                images = fn.crop(
                    images,
                    crop_h=side,
                    crop_w=side,
                    crop_pos_x=0.5,
                    crop_pos_y=0.5,
                    rounding="truncate",
                )
            images = fn.resize(
                images,
                size=[self.image_size, self.image_size],
                interp_type=types.INTERP_CUBIC,
                antialias=True,
                dtype=types.UINT8,
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _run(self, encoded: list[bytes], headers: list[ImageHeader]) -> Tensor:
        """One run over a batch: uint8 [n, S, S, 3], a copy; after a RuntimeError the pipeline is gone."""
        if self._pipeline is None or len(encoded) > self._capacity:
            self._capacity = max(self._capacity, 1 << (len(encoded) - 1).bit_length())
            self._pipeline = self._build()
        pipeline = self._pipeline
        pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8) for data in encoded])
        if self.fit == "crop":
            sides = [np.array(min(header.width, header.height), dtype=np.float32) for header in headers]
            pipeline.feed_input("side", sides)
        try:
            (output,) = pipeline.run()
        except RuntimeError:
            self._pipeline = None
            raise
        if self.on_gpu:
            return torch.from_dlpack(output.as_tensor()).clone()
        return torch.from_numpy(np.array(output.as_array()))

    def _decode_alone(self, data: bytes, header: ImageHeader) -> Tensor:
        return ImageDecoder._decode_alone(self, data, header)  # never torchvision's decode_png

    def _decode_together(
        self, encoded: Sequence[bytes], headers: dict[int, ImageHeader], images: Tensor
    ) -> set[int]:
        slots = {index: slot for slot, index in enumerate(headers)}
        groups: list[list[int]] = []
        room = 0
        for index, header in headers.items():
            if not self._takes(header):
                continue
            pixels = header.width * header.height
            if not groups or pixels > room:
                groups.append([])
                room = _PIXELS_TOGETHER
            groups[-1].append(index)
            room -= pixels
        done: set[int] = set()
        while groups:
            group = groups.pop(0)
            data = [encoded[index] for index in group], [headers[index] for index in group]
            try:
                batch = self._run(*data)
            except RuntimeError as error:
                groups[:0] = self._without_culprit(group, error, *data)
                continue
            places = [slots[index] for index in group]
            if places[-1] - places[0] + 1 == len(places):
                _normalise(batch, images[places[0] : places[-1] + 1])
            else:
                part = torch.empty(len(group), *images.shape[1:], device=self.device)
                _normalise(batch, part)
                images[torch.tensor(places, device=self.device)] = part
            done.update(group)
        return done

    def _without_culprit(
        self, group: list[int], error: RuntimeError, encoded: list[bytes], headers: list[ImageHeader]
    ) -> list[list[int]]:
        """Cut up a group that DALI failed on: without its bad image, or in halves where none is bad.

        DALI names the image; should it not, the images are tried one by one. Where every one decodes alone,
        together they were too much for the memory.
        """
        named = re.search(r"[Ff]ailed to decode sample #(\d+)", str(error))
        culprit = int(named[1]) if named and int(named[1]) < len(group) else None
        if culprit is None and len(group) > 1:
            culprit = self._tried_alone(encoded, headers)
            if culprit is None:
                logger.warning("DALI failed on %d images together, now in halves: %s", len(group), error)
                return [group[: len(group) // 2], group[len(group) // 2 :]]
        left = [index for position, index in enumerate(group) if position != (culprit or 0)]
        return [left] if left else []

    def _tried_alone(self, encoded: list[bytes], headers: list[ImageHeader]) -> int | None:
        """Return the position of the first image that DALI cannot decode alone."""
        for position, (data, header) in enumerate(zip(encoded, headers, strict=True)):
            try:
                self._run([data], [header])
            except RuntimeError:
                return position
        return None


def build_image_decoder(
    image_size: int,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
    fit: Fit = "resize",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    num_threads: int = 1,
) -> ImageDecoder:
    """Choose and build a decoder: a callable from a list of encoded images to `DecodedImages`.

    `auto` is DALI with `mixed` decoding for a CUDA device, and torchvision for the CPU, where it is faster
    than DALI both on small PNGs and on photographs (`benchmarks/decoding.py`).

    Args:
        image_size: side S of the square result in pixels.
        backend: `auto`, `dali`, `torchvision` or `pil` (the slow reference).
        device: where the result is to be.
        fit: `resize` squeezes the whole picture into the square, `crop` takes its largest centred square.
        max_pixels: pictures with more pixels are rejected unseen.
        num_threads: threads that decode.

    Raises:
        ValueError: an argument is out of range.
        ImportError: the backend is not installed.
    """
    device = torch.device(device)
    if image_size < 1 or max_pixels < 1 or num_threads < 1:
        raise ValueError(
            f"image_size {image_size}, max_pixels {max_pixels}, num_threads {num_threads}: expected 1 or more"
        )
    if fit not in ("resize", "crop"):
        raise ValueError(f"fit is {fit!r}, expected 'resize' or 'crop'")
    if backend == "auto":
        backend = "dali" if device.type == "cuda" else "torchvision"
    classes = {"dali": DaliDecoder, "torchvision": TorchvisionDecoder, "pil": ImageDecoder}
    if backend not in classes:
        raise ValueError(f"image decoding backend is {backend!r}, expected auto, {', '.join(classes)}")
    return classes[backend](image_size, device, fit, max_pixels, num_threads)
