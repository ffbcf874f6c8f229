"""Pictures for a training step: undecoded bytes in, tensors out; what cannot be decoded is recorded."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from data_pipeline.images.decoding import DecodedImages, SideDecoder, build_image_decoder
from data_pipeline.streams import ImageTextBatch
from data_pipeline.streams.loader import StreamLoader
from pretrain.runtime import Runtime

AHEAD = 2  # micro-batches that are decoded, or about to be, while a step uses the one before them


@dataclass
class ImageInputConfig:
    """How pictures are decoded."""

    backend: Literal["auto", "dali", "torchvision"] = "auto"
    fit: Literal["resize", "crop"] = "resize"  # to a square: squeezed, or short side resized and cropped


class ImageInput:
    """Decodes micro-batches on this rank's device; broken pictures go to the run folder's rejected.jsonl.

    All decoding is done in one thread beside the one that computes. There `AHEAD` of the micro-batches that
    are expected are decoded before they are asked for; what is not expected is decoded when it is.
    """

    def __init__(self, config: ImageInputConfig, image_size: int, runtime: Runtime):
        self.decoder = build_image_decoder(
            image_size, backend=config.backend, device=str(runtime.device), fit=config.fit
        )
        self.runtime = runtime
        self._decode = SideDecoder(self.decoder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoding")
        self._expected = deque[tuple[ImageTextBatch, Future[DecodedImages] | None]]()
        self.rejected_keys: set[str] = set()  # one line per broken picture, not one per epoch

    def __call__(self, batch: ImageTextBatch) -> tuple[Tensor, list[int]]:
        """Return the readable pictures ``[N, 3, H, W]`` in [-1, 1] and their places; N may be 0."""
        with self.runtime.clock.part("data"):
            decoded = self._take(batch).result()
            images = decoded.for_current_stream().to(self.runtime.device, non_blocking=True)
        for rejected in decoded.rejected:
            self._record(batch.keys[rejected.index], rejected.reason)
        return images, decoded.kept

    def ahead(self, loader: StreamLoader[ImageTextBatch]) -> ImagesAhead:
        """Return a training loader whose micro-batches are expected."""
        return ImagesAhead(loader, self)

    def expect(self, batch: ImageTextBatch) -> None:
        """Decode a micro-batch ahead, as soon as fewer than `AHEAD` are."""
        self._expected.append((batch, None))
        self._decode_ahead()

    def forget_expected(self) -> None:
        """Expect nothing any more."""
        self._expected.clear()

    def _take(self, batch: ImageTextBatch) -> Future[DecodedImages]:
        if not any(expected is batch for expected, _ in self._expected):
            return self._thread.submit(self._decode, batch.image_bytes)
        while True:
            expected, decoding = self._expected.popleft()  # one that was not asked for is not needed any more
            if expected is batch:
                break
        decoding = decoding or self._thread.submit(self._decode, batch.image_bytes)
        self._decode_ahead()
        return decoding

    def _decode_ahead(self) -> None:
        for place, (batch, decoding) in enumerate(self._expected):
            if place == AHEAD:
                break
            if decoding is None:
                self._expected[place] = batch, self._thread.submit(self._decode, batch.image_bytes)

    def describe(self) -> str:
        """Return the choice of decoder in words."""
        return self.decoder.describe()

    def state_dict(self) -> dict[str, list[str]]:
        """Return which pictures have been recorded."""
        return {"rejected_keys": sorted(self.rejected_keys)}

    def load_state_dicts(self, states: list[dict[str, list[str]]]) -> None:
        """Take back what :meth:`state_dict` gave, on this rank or on all of another number of ranks."""
        self.rejected_keys = {key for state in states for key in state["rejected_keys"]}

    def _record(self, key: str, reason: str) -> None:
        if key in self.rejected_keys:
            return
        self.rejected_keys.add(key)
        with open(self.runtime.run_dir / "rejected.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "reason": reason, "step": self.runtime.step}) + "\n")


class ImagesAhead:
    """A training loader that takes micro-batches `AHEAD` before they are used, so that they can be decoded.

    Its state is that of what was used: what was taken ahead comes again after a resume.
    """

    def __init__(self, loader: StreamLoader[ImageTextBatch], images: ImageInput) -> None:
        self.loader, self.images = loader, images
        self._taken = deque[ImageTextBatch]()
        self._error: Exception | None = None

    def __iter__(self) -> ImagesAhead:
        return self

    def __next__(self) -> ImageTextBatch:
        while len(self._taken) <= AHEAD and self._error is None:
            try:
                batch = next(self.loader)
            except Exception as error:  # to be raised in its place
                self._error = error
            else:
                self._taken.append(batch)
                self.images.expect(batch)
        if self._taken:
            return self._taken.popleft()
        assert self._error is not None
        error, self._error = self._error, None
        raise error

    def describe(self) -> str:
        """Return in words how the samples are divided over readers and ranks."""
        return self.loader.describe()

    def save_state(self) -> dict[str, Any]:
        """Return the place in the stream, before what was taken ahead."""
        return self.loader.save_earlier_state(len(self._taken))

    def restore_states(self, states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Go to a saved place; as `StreamLoader.restore_states`."""
        self._forget()
        return self.loader.restore_states(states)

    def close(self) -> None:
        """Stop the worker processes, if any."""
        self._forget()
        self.loader.close()

    def _forget(self) -> None:
        self._taken.clear()
        self._error = None
        self.images.forget_expected()
