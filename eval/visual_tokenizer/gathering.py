"""What ranks found, put together through files: no process group, so that any launcher does."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.visual_tokenizer.batches import Share


@dataclass(frozen=True)
class Part:
    """What a rank found, or, gathered, all of them."""

    numbers: np.ndarray  # [n] int64, of the pictures in their set
    rows: Mapping[str, np.ndarray]  # each [n, ...]: a value for each picture
    sums: Mapping[str, np.ndarray]  # over the pictures

    @classmethod
    def of_batches(
        cls,
        numbers: Sequence[int],
        rows: Mapping[str, Sequence[np.ndarray]],
        sums: Mapping[str, np.ndarray] | None = None,
    ) -> "Part":
        """A part of the rows of batches; without rows where the rank had none."""
        together = {name: np.concatenate(values) for name, values in rows.items() if values}
        return cls(np.array(numbers, dtype=np.int64), together, sums or {})


def gather(folder: Path, share: Share, settings: Mapping[str, Any], part: Part, count: int) -> Part | None:
    """All ranks' rows in the order of the pictures, and their sums added, for the rank that is done last.

    The others get None. Rows and sums of integers are the same for any number of ranks, sums of floats up to
    their last digits.

    Args:
        folder: of the measure, shared by all ranks.
        share: this rank's.
        settings: what decides the figures; parts of another run are not mixed in.
        part: what this rank found.
        count: pictures of all ranks together.
    """
    if share.world_size == 1:
        return _together([part], count)
    text = json.dumps([share.world_size, count, settings], sort_keys=True, default=str)
    parts = folder / f"parts-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    parts.mkdir(parents=True, exist_ok=True)
    temporary = parts / f".{share.rank}.{uuid.uuid4().hex}"
    rows = {f"row.{name}": values for name, values in part.rows.items()}
    sums = {f"sum.{name}": values for name, values in part.sums.items()}
    with open(temporary, "wb") as file:
        np.savez(file, numbers=part.numbers, **rows, **sums)  # type: ignore[arg-type]
    temporary.rename(parts / f"{share.rank}.npz")
    names = [f"{rank}.npz" for rank in range(share.world_size)]
    try:
        if not set(names) <= set(os.listdir(parts)):
            return None
        mine = folder / f".{parts.name}.{uuid.uuid4().hex}"
        parts.rename(mine)  # which one rank alone can do
    except FileNotFoundError:
        return None
    gathered = _together([_read(mine / name) for name in names], count)
    shutil.rmtree(mine)
    return gathered


def _read(path: Path) -> Part:
    with np.load(path, allow_pickle=False) as arrays:
        named = {
            kind: {n[4:]: arrays[n] for n in arrays if n.startswith(f"{kind}.")} for kind in ("row", "sum")
        }
        return Part(arrays["numbers"], named["row"], named["sum"])


def _together(parts: Sequence[Part], count: int) -> Part:
    numbers = np.concatenate([part.numbers for part in parts])
    order = np.argsort(numbers)
    assert np.array_equal(numbers[order], np.arange(count)), "a picture was measured twice or not at all"
    filled = [part for part in parts if len(part.numbers)]  # there may be more ranks than batches
    rows = {name: np.concatenate([part.rows[name] for part in filled])[order] for name in filled[0].rows}
    return Part(
        numbers[order], rows, {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
    )
