"""LLaVA's instruction data, one json and a folder of pictures, as image-text shards."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DatasetError
from data_pipeline.names import is_below
from data_pipeline.shards.conversations import IMAGE_TAG
from data_pipeline.shards.image_text_shards import is_image_part
from data_pipeline.whole_folder import whole_folder

REJECTED = "rejected.jsonl"
TURNS_LEFT_OUT = "turns_left_out.jsonl"
_NO_SUCH_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass
class LlavaImport:
    """What was made of a json; in = samples + rejected."""

    samples: int = 0
    images: int = 0
    shards: int = 0
    rejected: int = 0
    turns_left_out: int = 0
    """Turns of the samples that LLaVA does not learn from."""


def import_llava(
    source: str | Path, images: str | Path, output: str | Path, samples_per_shard: int = 2000
) -> LlavaImport:
    """Write shards of `KEY.json` and `KEY.0.jpg`, ... from LLaVA's json, for pretokenize to read.

    Pictures are copied byte by byte, in the order of the json; samples without a picture are kept. As LLaVA's
    ids repeat, keys are numbers in the order of the json, and the id stays in `KEY.json`. Samples whose
    picture is missing go to `rejected.jsonl`. Turns that LLaVA's own training passes over, a first one by gpt
    and a question with an empty answer, go to `turns_left_out.jsonl`. An `<image>` in a sample without a
    picture is a word. The folder is there when all is done, or not at all.

    Args:
        source: List of `{"id", "image", "conversations"}`, or one such object a line; `image` is a path below
            `images`, a list of them, or left out.
        images: Folder of the pictures.
        output: Folder to make.
        samples_per_shard: Samples of the json that make one shard.

    Raises:
        DatasetError: The json or the pictures are not there, the output is, or no sample can be used.
        OSError: A picture is there but cannot be read: the disk or network may be at fault, not the sample.
    """
    source, images, output = Path(source), Path(images), Path(output)
    if samples_per_shard < 1:
        raise DatasetError(f"samples_per_shard is {samples_per_shard}, expected 1 or more")
    if not source.is_file() or not images.is_dir():
        missing = source if not source.is_file() else images
        raise DatasetError(f"{missing}: not found; expected LLaVA's json and the folder of its pictures")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DatasetError(f"{output}: is there already; choose another folder or remove it")
    counts = LlavaImport()
    with (
        whole_folder(output) as folder,
        _shard_writer(folder, samples_per_shard) as writer,
        open(folder / REJECTED, "w", encoding="utf-8") as rejected,
        open(folder / TURNS_LEFT_OUT, "w", encoding="utf-8") as turns_left_out,
    ):
        for number, record in enumerate(iterate_records(source)):
            try:
                sample, left_out = _sample(f"{number:09d}", record, images)
            except ValueError as error:
                name = record.get("id") if isinstance(record, dict) else None
                line = {"number": number, "id": name, "reason": str(error)}
                rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
                counts.rejected += 1
                continue
            if left_out:
                line = {"number": number, "id": record.get("id"), "turns": left_out}
                turns_left_out.write(json.dumps(line, ensure_ascii=False) + "\n")
                counts.turns_left_out += len(left_out)
            writer.write(sample)
            counts.samples += 1
            counts.images += len(sample) - 2  # without key and json
        if not counts.samples:
            raise DatasetError(f"{source}: none of its {counts.rejected} samples can be used")
        counts.shards = writer.shard
    return counts


def _shard_writer(folder: Path, samples_per_shard: int) -> Any:
    import webdataset

    # Absolute: webdataset runs a name that begins with `pipe:`.
    pattern = f"{folder.absolute()}/".replace("%", "%%") + "shard-%06d.tar"
    return webdataset.ShardWriter(pattern, samples_per_shard, math.inf, verbose=0, encoder=False, mtime=0)


def _sample(key: str, record: Any, images: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return a sample for webdataset and its turns left out; ValueError with the reason if it is unusable."""
    if not isinstance(record, dict) or "conversations" not in record:
        raise ValueError("no conversations")
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list):
        raise ValueError(f"image is {names!r:.80}, expected the name of a picture or a list of names")
    sample: dict[str, Any] = {"__key__": key}
    for index, name in enumerate(names):
        if not is_image_part(str(name)):
            raise ValueError(f"{name}: not the name of a picture")
        if not is_below(name):
            raise ValueError(f"{name}: not a name below the folder of the pictures")
        try:
            data = (images / name).read_bytes()
        except OSError as error:
            if error.errno not in _NO_SUCH_FILE:
                raise
            raise ValueError(f"{name:.80}: {error.strerror}") from error
        sample[f"{index}.{name.rpartition('.')[2].lower()}"] = data
    turns, left_out = _learned_turns(record["conversations"], bool(names))
    kept = {**({"id": record["id"]} if "id" in record else {}), "conversations": turns}
    return {**sample, "json": json.dumps(kept, ensure_ascii=False).encode()}, left_out


def _learned_turns(turns: Any, pictures: bool) -> tuple[Any, list[Any]]:
    """Return the turns that LLaVA trains on, and the others.

    It passes over a first turn that is not the human's, and learns nothing of an empty answer; the tags of
    such an answer's question go to the question after it. Without pictures a tag is marked as words. A
    mistake of form is left as it is, for pretokenize to name.
    """
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
    ):
        return turns, []
    kept: list[dict[str, Any]] = []
    left_out: list[Any] = []
    tags = 0
    for turn in turns:
        speaker, text = turn.get("from"), turn["value"]
        before = kept[-1].get("from") if kept else None
        if speaker == "gpt" and before in (None, "system") and not (left_out or IMAGE_TAG in text):
            left_out.append(turn)
        elif speaker == "gpt" and before == "human" and not text.strip():
            question = kept.pop()
            tags = question["value"].count(IMAGE_TAG) if pictures else 0
            left_out += [question, turn]
        else:
            words = {"words": True} if IMAGE_TAG in text and not pictures else {}
            kept.append({**turn, "value": f"{IMAGE_TAG}\n" * tags + text, **words})
            tags = 0
    if left_out and (tags or not any(turn.get("from") == "gpt" for turn in kept)):
        raise ValueError("no answer to learn")
    return kept, left_out


def iterate_records(source: Path) -> Iterator[Any]:
    """Yield the records of a json list, or of a file with one record after another, without holding it whole.

    Half of a surrogate pair (an escaped `ud83d` alone), which is no character, is read as `?` by ijson.

    Raises:
        DatasetError: The file breaks off or is not json.
    """
    import ijson

    with open(source, "rb") as file:
        while (first := file.read(1)).isspace():
            pass
        file.seek(0)
        where = "item" if first == b"[" else ""
        try:
            yield from ijson.items(file, where, multiple_values=not where, use_float=True)
        except ijson.JSONError as error:
            reason = str(error).partition("\n")[0]
            raise DatasetError(f"{source}: cannot be read as json: {reason}") from error
