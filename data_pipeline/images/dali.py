"""Decoding by NVIDIA DALI: on the GPU (`mixed`) where there is one, else on the CPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.images.decoding import ImageDecoder, TorchvisionDecoder, logger, normalise
from data_pipeline.images.header import ImageHeader, jpeg_begins, webp_is_whole

_END_OF_JPEG = b"\xff\xd9"
_PIXELS_TOGETHER = 1 << 27  # of images that DALI decodes together: 400 MB decoded


class DaliDecoder(TorchvisionDecoder):
    """Decodes and resizes with DALI: on a GPU `mixed` (nvJPEG), else its CPU operators.

    Batches are cut where their images have too many pixels, by their headers, to be decoded at a time.
    A pipeline is no longer valid after an image it cannot decode, and what it decoded of the batch is lost.
    So what is broken in front of its pixels is found before, once, and never given to DALI; what still fails
    costs a new pipeline. Images with transparency, CMYK, 16 bits or extended WebP and truncated files go to
    PIL and torch. The GPU path has not been run: it was written without a GPU at hand.
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

    def _given(self, encoded: Sequence[bytes], headers: dict[int, ImageHeader]) -> list[int]:
        """Which images DALI is given: not those that are not for it, or broken in front of their pixels."""
        taken = [index for index, header in headers.items() if self._takes(header, encoded[index])]
        jpegs = [[index] for index in taken if headers[index].format == "JPEG"]
        begun = self._map(lambda one: jpeg_begins(encoded[one[0]]), jpegs)
        broken = {index for (index,), begins in zip(jpegs, begun, strict=True) if not begins}
        return [index for index in taken if index not in broken]

    def _takes(self, header: ImageHeader, data: bytes) -> bool:
        # A truncated JPEG would cost the pipeline and its whole batch. Without an end marker in its second
        # half (the first may hold a whole thumbnail) PIL decides, as it would after DALI had failed.
        if header.format == "JPEG" and data.find(_END_OF_JPEG, len(data) // 2) < 0:
            return False
        if header.format == "WEBP" and not webp_is_whole(data):
            return False
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
        """One run over a batch: uint8 [n, S, S, 3], a copy.

        Raises:
            RuntimeError: DALI cannot decode all of it; the pipeline is gone.
        """
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
            images = torch.from_dlpack(output.as_tensor()).clone()
            # The next run overwrites what this one gave, on a stream of DALI's own.
            torch.cuda.current_stream(self.device).synchronize()
            return images
        return torch.from_numpy(np.array(output.as_array()))

    def _decode_alone(self, data: bytes, header: ImageHeader) -> np.ndarray | Tensor:
        return ImageDecoder._decode_alone(self, data, header)  # never torchvision's decode_png

    def _decode_together(
        self, encoded: Sequence[bytes], headers: dict[int, ImageHeader], images: Tensor
    ) -> set[int]:
        slots = {index: slot for slot, index in enumerate(headers)}
        groups: list[list[int]] = []
        room = 0
        for index in self._given(encoded, headers):
            pixels = headers[index].width * headers[index].height
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
                normalise(batch, images[places[0] : places[-1] + 1])
            else:
                part = torch.empty(len(group), *images.shape[1:], device=self.device)
                normalise(batch, part)
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
