"""Files of torch.save, read as tensors and plain containers: nothing in them is executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Read a ``.pt``, ``.pth`` or ``.bin`` file whose content is a dict, onto the CPU.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged, holds more than tensors and plain containers, or is no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is refused: it is not a plain file of tensors, reading it would run code ({reason}); "
            "where you trust it, load it there and save its 'state_dict' alone by torch.save"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict with 'state_dict'")
    return content
