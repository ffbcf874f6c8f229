"""Pictures for a training step: undecoded bytes in, tensors out; what cannot be decoded is recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from data_pipeline.images.decoding import build_image_decoder
from data_pipeline.streams import ImageTextBatch
from pretrain.runtime import Runtime


@dataclass
class ImageInputConfig:
    """How pictures are decoded."""

    backend: Literal["auto", "dali", "torchvision"] = "auto"
    fit: Literal["resize", "crop"] = "resize"  # to a square: squeezed, or short side resized and cropped


class ImageInput:
    """Decodes micro-batches on this rank's device; broken pictures go to the run folder's rejected.jsonl."""

    def __init__(self, config: ImageInputConfig, image_size: int, runtime: Runtime):
        self.decoder = build_image_decoder(
            image_size, backend=config.backend, device=str(runtime.device), fit=config.fit
        )
        self.runtime = runtime
        self.rejected_keys: set[str] = set()  # one line per broken picture, not one per epoch

    def __call__(self, batch: ImageTextBatch) -> tuple[Tensor, list[int]]:
        """Return the readable pictures ``[N, 3, H, W]`` in [-1, 1] and their places; N may be 0."""
        decoded = self.decoder(batch.image_bytes)
        for rejected in decoded.rejected:
            self._record(batch.keys[rejected.index], rejected.reason)
        return decoded.images.to(self.runtime.device, non_blocking=True), decoded.kept

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
