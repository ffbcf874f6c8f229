"""The index that Megatron-Energon needs beside a folder of WebDataset tars: making it, and checking it."""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from megatron.energon import __version__ as energon_version
from megatron.energon.bracecollapse import collapse
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.indexing import DuplicateSampleKeyError, SqliteIndexWriter
from megatron.energon.flavors.webdataset.prepare import IndexSample, IndexSamplePart

from data_pipeline.errors import DatasetError
from data_pipeline.names import is_below
from data_pipeline.shards.code_shards import temporary_name
from data_pipeline.shards.remote_files import is_remote, read_remote
from data_pipeline.shards.tar_members import BUFFER, TarError, locate_samples

META_FOLDER = ".nv-meta"
_INFO_FILE = ".info.json"
_DATASET_FILE = "dataset.yaml"
_SPLIT_FILE = "split.yaml"
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
        return struct.unpack("<Q", file.read(_OFFSET_BYTES))[0]


def _counts(info: bytes | str, where: object) -> dict[str, int]:
    """Read samples per shard from an index; DatasetError if a shard is named outside the data set."""
    counts = json.loads(info)["shard_counts"]
    if outside := [name for name in counts if not is_below(name)]:
        raise DatasetError(f"{where}: {META_FOLDER}/{_INFO_FILE} names a shard outside it, {outside[0]!r}")
    return counts


def _shard_counts(folder: Path) -> dict[str, int] | None:
    """Return samples per shard as the index has them, or None where there is no complete index."""
    meta = folder / META_FOLDER
    if not all((meta / name).is_file() for name in (_INFO_FILE, _SPLIT_FILE, _DATASET_FILE)):
        return None
    return _counts((meta / _INFO_FILE).read_text(encoding="utf-8"), folder)


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


def prepare_dataset(folder: str | Path, force: bool = False) -> int:
    """Index a folder of WebDataset tars for Megatron-Energon, all shards in the split `train`.

    The same as `energon prepare FOLDER --non-interactive --split-ratio 1,0,0 --sample-type CrudeWebdataset`,
    which does it in parallel for very many shards; this one starts no processes, so that none is left should
    it be killed, and does nothing where the index is up to date.

    Args:
        folder: Holds the tars, at any depth.
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
    meta = folder / META_FOLDER
    meta.mkdir(exist_ok=True)
    (meta / _DATASET_FILE).unlink(
        missing_ok=True
    )  # written last: its presence says that the index is complete
    counts = _index_shards(folder, shards)
    info = {"energon_version": energon_version, "shard_counts": counts}
    split = {
        "split_parts": {"train": collapse(shards, keep_order=True), "val": [], "test": []},
        "exclude": [],
    }
    definition = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (meta / "index.uuid").write_text(str(uuid.uuid4()), encoding="utf-8")
    (meta / _INFO_FILE).write_text(json.dumps(info, indent=2), encoding="utf-8")
    (meta / _SPLIT_FILE).write_text(yaml.safe_dump(split, sort_keys=False), encoding="utf-8")
    (meta / _DATASET_FILE).write_text(yaml.safe_dump(definition, sort_keys=False), encoding="utf-8")
    return sum(counts.values())


def _index_shards(folder: Path, shards: list[str]) -> dict[str, int]:
    """Write the offsets beside each tar and `index.sqlite`; return the samples of each shard."""
    database = folder / META_FOLDER / "index.sqlite"
    for leftover in database.parent.glob("index.sqlite*"):
        leftover.unlink()
    counts = {}
    writer = SqliteIndexWriter(EPath(database))
    try:
        for number, name in enumerate(shards):
            counts[name] = _index_shard(folder / name, number, writer)
        writer.close()
    except DuplicateSampleKeyError as error:
        raise DatasetError(
            f"{folder}: key {error.sample_key} occurs more than once; keys must be unique in a data set "
            "(for pretokenize: --prefix-keys)"
        ) from None
    finally:
        if writer.db is not None:
            writer.db.close()
    return counts


def _index_shard(tar: Path, number: int, writer: SqliteIndexWriter) -> int:
    """Index one shard: the offset of each sample and of the end, 8 bytes each, and rows for the data base."""
    try:
        with open(tar, "rb", buffering=BUFFER) as file:
            places, end = locate_samples(file)
    except TarError as error:
        raise DatasetError(f"{tar}: {error}") from error
    if not places:
        raise DatasetError(f"{tar}: holds no sample; remove the shard")
    offsets = [place.offset for place in places] + [end]
    writer.append_samples(
        [
            IndexSample(
                tar_file_id=number,
                sample_key=place.key,
                sample_index=index,
                byte_offset=place.offset,
                byte_size=offsets[index + 1] - place.offset,
            )
            for index, place in enumerate(places)
        ]
    )
    writer.append_parts(
        [
            IndexSamplePart(
                tar_file_id=number,
                sample_index=index,
                part_name=part,
                content_byte_offset=offset,
                content_byte_size=size,
            )
            for index, place in enumerate(places)
            for part, offset, size in place.parts
        ]
    )
    temporary = temporary_name(_index_path(tar))
    temporary.write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
    os.replace(temporary, _index_path(tar))
    return len(places)


@contextmanager
def local_index(folder: str | Path) -> Iterator[str]:
    """Give a local folder in which Energon finds what it reads at the start: shards, samples, splits.

    Of an address that is a copy of these small files, which is gone afterwards.
    """
    if not is_remote(folder):
        yield str(folder)
        return
    with TemporaryDirectory() as copy:
        meta = Path(copy) / META_FOLDER
        meta.mkdir()
        for name in (_INFO_FILE, _SPLIT_FILE):
            (meta / name).write_bytes(_read_index(folder, name))
        yield copy


def _read_index(address: str | Path, name: str) -> bytes:
    try:
        return read_remote(f"{str(address).rstrip('/')}/{META_FOLDER}/{name}")
    except (OSError, ValueError, ImportError) as error:
        raise DatasetError(f"{error}; expected a data set prepared for Energon at {address}") from error


def check_index(folder: str | Path, check_shards: bool = True) -> int:
    """Check that a data set can be streamed: index present, and of a local one every shard there and whole.

    Args:
        folder: A folder made ready by `prepare_dataset`, or its address (`://`).
        check_shards: Look at the size of every local shard, not only at the index: some requests to the file
            system for each, too many of them where all of very many ranks ask.

    Returns:
        The number of samples.

    Raises:
        DatasetError: One line saying what is missing and what to do.
    """
    if is_remote(folder):
        return sum(_counts(_read_index(folder, _INFO_FILE), folder).values())
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; expected a data set of WebDataset tars")
    counts = _shard_counts(Path(folder))
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
