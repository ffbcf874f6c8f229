"""Whether two model folders are the same, file by file."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def assert_same_folder(found: Path, expected: Path) -> None:
    """Same files; tensors to the bit, JSON by its values. A report of the conversion may be there besides."""
    names = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert {path.relative_to(found) for path in found.rglob("*") if path.is_file()} - {
        Path("conversion.json")
    } == names
    for name in names:
        if name.suffix == ".safetensors":
            tensors, others = load_file(found / name), load_file(expected / name)
            assert tensors.keys() == others.keys()
            for key, value in others.items():
                assert tensors[key].dtype == value.dtype and torch.equal(tensors[key], value), key
        elif name.suffix == ".json":
            assert json.loads((found / name).read_bytes()) == json.loads((expected / name).read_bytes()), name
        else:
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
