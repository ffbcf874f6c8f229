"""Image-text shards as they come in: which ones, their samples in order, and what a sample says.

A sample is `KEY.jpg` (png, webp ...) or `KEY.0.jpg`, `KEY.1.jpg` with `KEY.txt` (a caption) or `KEY.json`:
`{"caption": ...}`, `{"captions": {"en": ...}}`, `{"conversations": [...]}` (LLaVA), or an interleaved
document, `{"parts": [{"text": ...}, {"image": 0}]}` or as in OBELICS and MMC4. What is about
one image may have captions beside it, for the views that read these.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import DatasetError
from data_pipeline.shards.conversations import (
    TEMPLATES,
    ConversationError,
    conversation_parts,
    interleaved_parts,
)
from data_pipeline.shards.remote_files import is_remote, stream_remote
from data_pipeline.shards.tar_members import BUFFER, iterate_samples

_PIPE = "pipe:"
_GZIP = b"\x1f\x8b"
_DOCUMENT_FIELDS = {"parts", "texts", "text_list"}
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"})


@dataclass(frozen=True)
class SourceSettings:
    """How input samples are understood."""

    default_language: str = "en"
    """Language of a caption that does not say it."""
    prefix_keys: bool = False
    """Put the shard's name before keys, for inputs whose keys repeat from shard to shard."""
    chat_template: str = "qwen"
    """What stands around the turns of a conversation: `qwen`, `vicuna` or `plain`."""
    images_first: bool = False
    """Move the images of a turn to its start, as LLaVA-1.5 does."""
    generate_images: bool = False
    """Learn to generate the images of interleaved documents too."""

    def __post_init__(self) -> None:
        if self.chat_template not in TEMPLATES:
            raise ValueError(
                f"chat_template is {self.chat_template!r}, expected one of {', '.join(TEMPLATES)}"
            )


class BadSampleError(ValueError):
    """A sample that cannot be used; the message is the reason."""


@dataclass
class SourceSample:
    """An image-text sample: encoded images, ordered parts that name them, captions by language."""

    key: str
    images: list[bytes]
    parts: list[dict[str, Any]]
    captions: dict[str, str] | None = None


def is_image_part(part: str) -> bool:
    """Whether a part of a sample (`jpg`, `0.png`) is an image."""
    return part.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def image_parts(parts: dict[str, bytes]) -> list[str]:
    """Return the names of the images of a sample in the order of their numbers, whatever their formats."""

    def place(part: str) -> tuple[int, str, str]:
        number = part.rpartition(".")[0]
        return len(number), number, part

    return sorted(filter(is_image_part, parts), key=place)


def read_captions(parts: dict[str, bytes], default_language: str) -> dict[str, str]:
    """Read the captions of an image-text sample: `txt`, or `caption` or `captions` of `json`; {} without any.

    Raises:
        BadSampleError: They cannot be read, or are not text by language.
    """
    try:
        if "txt" in parts:
            return {default_language: parts["txt"].decode("utf-8-sig").strip()}
        record = json.loads(parts["json"]) if "json" in parts else None
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"caption cannot be read: {error}") from error
    if not isinstance(record, dict):
        return {}
    captions = record.get("captions")
    if captions is None:
        captions = {default_language: record["caption"]} if record.get("caption") is not None else {}
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise BadSampleError(f"captions are {captions!r:.80}, expected an object of language: text")
    return captions


def read_sample(key: str, parts: dict[str, bytes], settings: SourceSettings | None = None) -> SourceSample:
    """Read an image-text pair, a conversation or an interleaved document.

    Raises:
        BadSampleError: It does not fit its format, or cannot be read.
    """
    settings = settings or SourceSettings()
    images = [parts[name] for name in image_parts(parts)]
    document = _read_document(parts, len(images), settings)
    if document is not None and len(images) != 1:
        return SourceSample(key, images, document)
    if not images:
        raise BadSampleError(f"no image among its parts {sorted(parts)}")
    captions = read_captions(parts, settings.default_language)
    captions = {language: text for language, text in captions.items() if text.strip()}
    if document is not None:
        return SourceSample(key, images, document, captions or None)
    if not captions:
        raise BadSampleError("no caption")
    if len(images) > 1:
        raise BadSampleError(f"{len(images)} images with a caption; expected one, or json of a document")
    pair: list[dict[str, Any]] = [{"image": 0, "loss": False}, {"text": next(iter(captions.values()))}]
    return SourceSample(key, images, pair, captions)


def check_unicode(sample: SourceSample) -> None:
    """Raise BadSampleError if a name or text cannot be written as UTF-8."""
    try:
        sample.key.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(f"its name is not in UTF-8: {sample.key!r:.80}") from error
    try:
        json.dumps([sample.parts, sample.captions], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise BadSampleError(f"its text holds a lone surrogate, {half!r}, half of a character") from error


def _read_document(
    parts: dict[str, bytes], images: int, settings: SourceSettings
) -> list[dict[str, Any]] | None:
    """Return the parts of a conversation or interleaved document, None where the json is neither."""
    try:
        record = json.loads(parts.get("json", b"null"))
        if isinstance(record, dict) and "conversations" in record:
            turns, template = record["conversations"], settings.chat_template
            return conversation_parts(turns, images, template, images_first=settings.images_first)
        if isinstance(record, list) or _DOCUMENT_FIELDS & (record or {}).keys():
            return interleaved_parts(record, images, settings.generate_images)
    except ConversationError as error:
        raise BadSampleError(str(error)) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadSampleError(f"json cannot be read: {error}") from error
    return None


def read_shard(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Read a shard, local or remote, gzipped or not, as pairs of key and parts in the order of the tar.

    Raises:
        TarError: The shard is truncated or damaged; the samples before have been given.
        OSError: It is missing, or its storage fails, an address also after some tries.
    """
    with closing(open_shard(url)) as stream:
        yield from iterate_samples(stream)


def source_address(shard: str) -> str:
    """Return how a shard is remembered: a path from the root, an address without password and `?query`.

    These may be tokens, which change and are nobody else's business.
    """
    if is_remote(shard):
        return re.sub("://[^/]*@", "://", shard).partition("?")[0]
    return os.path.abspath(shard)


def without_tokens(text: str) -> str:
    """Return a text, such as an error's, with its addresses without user, password and query."""
    return re.sub(r"(://[^?\s]*)\?[^\s'\"]*", r"\1", re.sub(r"://[^/\s]*@", "://", text))


def open_shard(url: str) -> IO[bytes]:
    """Open a shard for reading, local or remote, gzipped or not.

    Raises:
        OSError: It cannot be opened, an address also after some tries.
    """
    stream: IO[bytes]
    if is_remote(url):
        try:
            stream = stream_remote(url)
        except (ValueError, ImportError) as error:  # no such kind of address, or a package for it is missing
            raise OSError(str(error)) from error
    else:
        stream = open(url, "rb", buffering=BUFFER)
    zipped = stream.peek(2)[:2] == _GZIP  # type: ignore[attr-defined]
    return gzip.open(stream) if zipped else stream  # type: ignore[return-value]


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """Return the shards that folders, globs, brace patterns and addresses stand for, each once, in order.

    Raises:
        DatasetError: An input stands for no shard, or for one that is not there.
    """
    from braceexpand import braceexpand

    found: dict[str, None] = {}
    for pattern in inputs:
        here: list[str] = []
        missing: list[str] = []
        for item in braceexpand(pattern):
            if item.startswith(_PIPE):
                raise DatasetError(
                    f"{item}: commands are not run; give the address itself (s3://bucket/a.tar) or a file"
                )
            if is_remote(item):
                here.append(item)
            elif Path(item).is_dir():
                here += sorted(
                    str(path) for path in Path(item).rglob("*.tar") if not path.name.startswith(".")
                )
            elif Path(item).is_file():
                here.append(item)
            elif glob.has_magic(item):
                here += sorted(glob.glob(item, recursive=True))
            else:
                missing.append(item)
        if here and missing:
            raise DatasetError(
                f"{missing[0]}: no such file; {len(missing)} of the shards of {pattern} are missing"
            )
        if not here:
            raise DatasetError(
                f"{pattern}: no shard found; expected a folder, glob or brace pattern of .tar files"
            )
        found.update(dict.fromkeys(here))
    return list(found)
