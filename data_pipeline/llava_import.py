"""LLaVA's instruction data, one json and a folder of pictures, as image-text shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DatasetError
from data_pipeline.shard_sources import is_image_part
from data_pipeline.whole_folder import whole_folder

REJECTED = "rejected.jsonl"


@dataclass
class LlavaImport:
    """What was made of a json; in = samples + rejected."""

    samples: int = 0
    images: int = 0
    shards: int = 0
    rejected: int = 0


def import_llava(
    source: str | Path, images: str | Path, output: str | Path, samples_per_shard: int = 2000
) -> LlavaImport:
    """Write shards of `KEY.json` and `KEY.0.jpg`, ... from LLaVA's json, for pretokenize to read.

    Pictures are copied byte by byte, in the order of the json; samples without a picture are kept. As LLaVA's
    ids repeat, keys are numbers in the order of the json, and the id stays in `KEY.json`. Samples whose
    picture is missing go to `rejected.jsonl`. The folder is there when all is done, or not at all.

    Args:
        source: List of `{"id", "image", "conversations"}`, or one such object a line; `image` is a path below
            `images`, a list of them, or left out.
        images: Folder of the pictures.
        output: Folder to make.
        samples_per_shard: Samples of the json that make one shard.

    Raises:
        DatasetError: The json or the pictures are not there, the output is, or no sample can be used.
    """
    import webdataset

    source, images, output = Path(source), Path(images), Path(output)
    if samples_per_shard < 1:
        raise DatasetError(f"samples_per_shard is {samples_per_shard}, expected 1 or more")
    if not source.is_file() or not images.is_dir():
        missing = source if not source.is_file() else images
        raise DatasetError(f"{missing}: not found; expected LLaVA's json and the folder of its pictures")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DatasetError(f"{output}: is there already; choose another folder or remove it")
    counts = LlavaImport()
    writer = None
    with whole_folder(output) as folder, open(folder / REJECTED, "w", encoding="utf-8") as rejected:
        for number, record in enumerate(iterate_records(source)):
            try:
                sample = _sample(f"{number:09d}", record, images)
            except ValueError as error:
                name = record.get("id") if isinstance(record, dict) else None
                line = {"number": number, "id": name, "reason": str(error)}
                rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
                counts.rejected += 1
                continue
            if counts.samples % samples_per_shard == 0:
                if writer is not None:
                    writer.close()
                path = str(folder / f"shard-{counts.shards:06d}.tar")
                writer = webdataset.TarWriter(path, encoder=False, mtime=0)
                counts.shards += 1
            assert writer is not None
            writer.write(sample)
            counts.samples += 1
            counts.images += len(sample) - 2  # without key and json
        if writer is None:
            raise DatasetError(f"{source}: none of its {counts.rejected} samples can be used")
        writer.close()
    return counts


def _sample(key: str, record: Any, images: Path) -> dict[str, Any]:
    """Return a sample for webdataset; ValueError with the reason why it cannot be used."""
    if not isinstance(record, dict) or "conversations" not in record:
        raise ValueError("no conversations")
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    sample: dict[str, Any] = {"__key__": key}
    for index, name in enumerate(names):
        if not is_image_part(str(name)):
            raise ValueError(f"{name}: not the name of a picture")
        try:
            data = (images / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror}") from error
        sample[f"{index}.{name.rpartition('.')[2].lower()}"] = data
    kept = {name: record[name] for name in ("id", "conversations") if name in record}
    return {**sample, "json": json.dumps(kept, ensure_ascii=False).encode()}


def iterate_records(source: Path) -> Iterator[Any]:
    """Yield the records of a json list, or of a file with one record after another, without holding it whole.

    Raises:
        DatasetError: The file breaks off or is not json.
    """
    import ijson

    with open(source, "rb") as file:
        where = "item" if file.peek(1)[:1] == b"[" else ""
        try:
            yield from ijson.items(file, where, multiple_values=not where, use_float=True)
        except ijson.JSONError as error:
            reason = str(error).partition("\n")[0]
            raise DatasetError(f"{source}: cannot be read as json: {reason}") from error
