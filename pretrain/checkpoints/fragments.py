"""Files of pieces of tensors, and wholes or other pieces read out of many of them; without DeepSpeed.

A file is safetensors: one-dimensional pieces by `KIND/NAME`, and in its metadata, under `starts`, where each
begins in the flattened whole. Nothing in it can be executed, and a piece is read without the rest of a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Fragments:
    """Pieces on the CPU, ready to be written."""

    tensors: dict[str, Tensor]  # by `KIND/NAME`, flat
    starts: dict[str, int]

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OSError, safetensors' own error: for example where the disk is full.
        """
        save_file(self.tensors, path, metadata={"starts": json.dumps(self.starts)})


@dataclass(frozen=True)
class Place:
    """Where elements `start` to `stop` of a tensor lie."""

    start: int
    stop: int
    file: str


Index = dict[str, list[Place]]


def read_index(folder: Path, files: Iterable[str]) -> Index:
    """Where the pieces of all `files` of a folder lie, by `KIND/NAME`; reads their headers only."""
    index: Index = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            for key, start in json.loads(file.metadata()["starts"]).items():
                stop = start + file.get_slice(key).get_shape()[0]
                index.setdefault(key, []).append(Place(start, stop, name))
    return {key: sorted(places, key=lambda place: place.start) for key, places in index.items()}


class FragmentReader:
    """Reads any stretch of any tensor that the files of an index hold."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.index = index
        self._open: dict[str, Any] = {}

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, on the CPU.

        Raises:
            ValueError: the files lack some of them.
        """
        parts: list[Tensor] = []
        at = start
        for place in self.index.get(key, ()):
            if place.start <= at < place.stop and at < stop:
                end = min(stop, place.stop)
                piece = self._file(place.file).get_slice(key)
                parts.append(piece[at - place.start : end - place.start])
                at = end
        if at < stop:
            found = "nothing of it" if not parts else f"elements up to {at}"
            raise ValueError(f"{self.folder} lacks a part of {key}: expected {start} to {stop}, got {found}")
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, device="cpu")

    def whole(self, key: str, shape: Sequence[int]) -> Tensor:
        """The whole tensor in its shape."""
        return self.read(key, 0, torch.Size(shape).numel()).reshape(tuple(shape))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]
