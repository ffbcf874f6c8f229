"""The identity of a model's folder, quickly: answers kept on disk name the model that gave them."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEXTS = (".json", ".jinja", ".txt", ".model")
"""Endings of configs, chat templates and text tokenizers; their files are read whole."""
WEIGHTS = (".safetensors", ".bin")
_BLOCK = 4096


def fingerprint_of_files(folder: Path) -> str:
    """The sha256 (hex) over a model's files, without reading all of its weights.

    Covered are, of the files that lie in the folder itself: those of `TEXTS` wholly (config.json, the text
    tokenizer), of safetensors the names, types and shapes of all tensors and 4 KiB from the beginning, the
    middle and the end of each, of other weights the size and the same three places. A change of single
    numbers elsewhere is not noticed; training changes all of them.

    Raises:
        ValueError: the folder has no weights.
    """
    digest = hashlib.sha256()
    weights = 0
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if path.suffix in TEXTS:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + path.read_bytes())
        elif path.suffix in WEIGHTS:
            weights += 1
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with open(path, "rb") as file:
                for block in _samples(file, path):
                    digest.update(block)
    if not weights:
        raise ValueError(f"no weights in {folder}; expected {' or '.join(f'*{end}' for end in WEIGHTS)}")
    return digest.hexdigest()


def _samples(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The head of a safetensors file, and a little of each tensor, or of a file of another kind."""
    spans = [(0, path.stat().st_size)]
    if path.suffix == ".safetensors":
        length = int.from_bytes(file.read(8), "little")  # of the JSON that follows
        head = file.read(length)
        yield head
        try:
            tensors = [entry for name, entry in json.loads(head).items() if name != "__metadata__"]
        except ValueError:
            raise ValueError(f"{path} is no safetensors file; is it whole?") from None
        spans = [tuple(8 + length + offset for offset in entry["data_offsets"]) for entry in tensors]
    for start, end in spans:
        for place in sorted({start, (start + end) // 2, max(start, end - _BLOCK)}):
            file.seek(place)
            yield file.read(min(_BLOCK, end - place))
