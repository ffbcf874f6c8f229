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
    content = read_plain(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict with 'state_dict'")
    return content


def read_plain(path: str | Path) -> Any:
    """Read a file of torch.save, whatever tensors and plain containers it holds, onto the CPU.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged, or holds more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is refused: it is not a plain file of tensors, reading it would run code ({reason}); "
            "where you trust it, load it there and save its 'state_dict' alone by torch.save"
        ) from error
    except Exception as error:  # what begins like a pickle and is none raises anything, such as KeyError
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); is it whole?") from error
