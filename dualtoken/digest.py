"""The identity of a model as far as what it makes of an image goes: a sha256 over settings and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def sha256_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) over settings, as JSON, and tensors with their names, types and shapes."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
