"""The index that Megatron-Energon needs beside a folder of WebDataset tars: making it, and checking it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import struct
from pathlib import Path

import yaml
from megatron.energon import CrudeWebdataset

from data_pipeline.errors import DatasetError

logger = logging.getLogger(__name__)

META_FOLDER = ".nv-meta"
_INFO_FILE = ".info.json"
_DATASET_FILE = "dataset.yaml"
_OFFSET_BYTES = 8


def list_shards(folder: Path) -> list[str]:
    """List the tars below `folder` as sorted relative names, without temporary and hidden files."""
    names = (path.relative_to(folder) for path in Path(folder).rglob("*.tar"))
    return sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts))


def _index_path(tar: Path) -> Path:
    return tar.with_name(tar.name + ".idx")


def _indexed_bytes(tar: Path) -> int:
    """Return how many bytes of `tar` its index describes (the last of the 8-byte offsets)."""
    with open(_index_path(tar), "rb") as file:
        file.seek(-_OFFSET_BYTES, os.SEEK_END)
        return struct.unpack("Q", file.read(_OFFSET_BYTES))[0]


def _shard_counts(folder: Path) -> dict[str, int] | None:
    """Return samples per shard as the index has them, or None where there is no complete index."""
    meta = folder / META_FOLDER
    if not all((meta / name).is_file() for name in (_INFO_FILE, "split.yaml", _DATASET_FILE)):
        return None
    return json.loads((meta / _INFO_FILE).read_text())["shard_counts"]


def _is_current(folder: Path, shards: list[str]) -> bool:
    counts = _shard_counts(folder)
    if counts is None or sorted(counts) != shards:
        return False
    for name in shards:
        tar, index = folder / name, _index_path(folder / name)
        if not index.is_file() or index.stat().st_mtime_ns < tar.stat().st_mtime_ns:
            return False
        if _indexed_bytes(tar) > tar.stat().st_size:
            return False
    return True


def prepare_dataset(folder: str | Path, num_workers: int | None = None, force: bool = False) -> int:
    """Index a folder of WebDataset tars for Megatron-Energon, all shards in the split `train`.

    The same as `energon prepare FOLDER --non-interactive --split-ratio 1,0,0 --sample-type CrudeWebdataset`,
    quiet, and doing nothing where the index is up to date.

    Args:
        folder: Holds the tars, at any depth.
        num_workers: Processes that read tars; None for as many as there are cores or tars.
        force: Index again even where the index is up to date.

    Returns:
        The number of samples.

    Raises:
        DatasetError: There is no tar, a tar cannot be read to its end or is empty, or a key occurs twice.
    """
    folder = Path(folder)
    shards = list_shards(folder)
    if not shards:
        raise DatasetError(f"{folder}: no .tar shard found; expected a folder of WebDataset tars")
    if not force and _is_current(folder, shards):
        return sum((_shard_counts(folder) or {}).values())
    # Written last, so that its presence says that the index is complete.
    (folder / META_FOLDER / _DATASET_FILE).unlink(missing_ok=True)
    workers = num_workers or min(len(shards), os.cpu_count() or 1)
    energon_logger = logging.getLogger("megatron.energon")
    level, messages = energon_logger.level, io.StringIO()
    energon_logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(messages):
            CrudeWebdataset.prepare_dataset(
                folder,
                shards,
                split_parts_ratio=[("train", 1.0), ("val", 0.0), ("test", 0.0)],
                shuffle_seed=None,
                workers=workers,
            )
    except SystemExit:  # Energon's answer to a key that occurs twice, after printing which
        duplicate = next((line for line in messages.getvalue().splitlines() if "duplicate key:" in line), "")
        key = duplicate.rpartition("duplicate key:")[2].strip(' "') or "unknown"
        raise DatasetError(
            f"{folder}: key {key} occurs more than once; keys must be unique in a data set"
        ) from None
    except AssertionError as error:  # a shard that held no readable sample
        raise DatasetError(f"{folder}: {error} Is a tar empty or damaged?") from None
    finally:
        energon_logger.setLevel(level)
    for name in shards:
        if not _index_path(folder / name).is_file():
            raise DatasetError(f"{folder / name}: cannot be read to its end; the tar is truncated or damaged")
    dataset_file = folder / META_FOLDER / _DATASET_FILE
    definition = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    dataset_file.write_text(yaml.safe_dump(definition, sort_keys=False))
    return sum((_shard_counts(folder) or {}).values())


def check_index(folder: str | Path, check_shards: bool = True) -> int:
    """Check that a local data set can be streamed: index present, every shard there and whole.

    Args:
        folder: A folder made ready by `prepare_dataset`; a remote address (`://`) is taken on trust.
        check_shards: Look at the size of every shard (one stat each), not only at the index.

    Returns:
        The number of samples, or -1 for a remote address.

    Raises:
        DatasetError: One line saying what is missing and what to do.
    """
    if "://" in str(folder):
        return -1
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; expected a data set of WebDataset tars")
    counts = _shard_counts(folder)
    if counts is None:
        raise DatasetError(
            f"{folder}: the Energon index ({META_FOLDER}) is missing; make it with `energon prepare {folder} "
            "--non-interactive --split-ratio 1,0,0 --sample-type CrudeWebdataset`"
        )
    for name in counts if check_shards else ():
        tar = folder / name
        if not tar.is_file():
            raise DatasetError(
                f"{tar}: named in the index but missing; restore it or prepare the data set again"
            )
        if not _index_path(tar).is_file():
            raise DatasetError(f"{tar}: its index {tar.name}.idx is missing; prepare the data set again")
        size, expected = tar.stat().st_size, _indexed_bytes(tar)
        if size < expected:
            raise DatasetError(f"{tar}: truncated, {size} bytes where the index expects at least {expected}")
    return sum(counts.values())
