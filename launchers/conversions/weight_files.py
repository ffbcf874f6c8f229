"""Weights in safetensors files, read and written tensor by tensor: no model has to be held whole."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from launchers.errors import UserError

SHARD_BYTES = 2 << 30
"""Size of a file of weights, and with it the memory that writing one takes."""
_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a small file whole; UserError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {error}; copy or export it again") from error


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a model folder by name; each is read from its file when it is asked for.

    Raises:
        FileNotFoundError: the folder, or its index, names no file of safetensors that is there.
        UserError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in self._listed():
            try:
                self._open[file] = safe_open(folder / file, framework="pt")
            except SafetensorError as error:
                raise UserError(
                    f"{folder / file} cannot be read: {error}; copy or export it again"
                ) from error
            self._file_of |= dict.fromkeys(self._open[file].keys(), file)

    def _listed(self) -> list[str]:
        index = self.folder / _INDEX
        files = [_ONE]
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for file in files:
            # A name from the index is one of a file in this folder, and of no other place.
            if Path(file).name != file or not (self.folder / file).is_file():
                raise FileNotFoundError(f"no weights at {self.folder / file}; expected a file of safetensors")
        return files

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._file_of[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, without reading a tensor."""
        slices = {name: self._open[file].get_slice(name) for name, file in self._file_of.items()}
        return {name: tuple(found.get_shape()) for name, found in slices.items()}


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors in their order as `save_pretrained` lays them out: one file, or shards with an index.

    No more than a shard, or the largest tensor, is held at a time.
    """
    files: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(waiting, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and sum(t.nbytes for t in waiting.values()) + tensor.nbytes > shard_bytes:
            flush()
        waiting[name] = tensor.detach().contiguous()
        total += tensor.nbytes
    del tensor  # else the last one would stay until the end
    flush()
    if len(files) == 1:
        (folder / "0.part").rename(folder / _ONE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def own_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a model as its file names them: tied ones once."""
    names = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if names[id(tensor)] == name
    }


def require_fit(source: Path, found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> None:
    """Raise UserError unless names and shapes of weights are those that their config says."""
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "superfluous": sorted(found.keys() - expected.keys()),
        "misshapen": sorted(
            f"{name} {found[name]}, not {expected[name]}"
            for name in found.keys() & expected.keys()
            if found[name] != expected[name]
        ),
    }
    wrong = [f"{len(names)} {kind} ({', '.join(names[:8])})" for kind, names in kinds.items() if names]
    if wrong:
        raise UserError(
            f"the weights in {source} do not fit the config: {'; '.join(wrong)}; nothing is written"
        )
