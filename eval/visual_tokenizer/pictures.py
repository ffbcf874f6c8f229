"""Pictures of the user's to measure on: a folder, a folder of classes, or WebDataset shards.

A set is a list of places: bytes are read when a batch wants them (`batches.py`).
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.shards.image_text_shards import IMAGE_EXTENSIONS, image_parts
from data_pipeline.shards.index import list_shards
from data_pipeline.shards.tar_members import TarError, locate_samples
from eval.progress import with_progress

TEXT_PARTS = ("cls", "json", "txt")


@dataclass(frozen=True)
class Place:
    """Where bytes lie: a file, or a stretch of it."""

    file: Path
    offset: int = 0
    size: int | None = None  # None for the whole file

    def read(self) -> bytes:
        """The bytes."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


@dataclass(frozen=True)
class Picture:
    """One picture: where it is and what is known of it."""

    key: str  # unique in its set
    place: Place
    texts: Mapping[str, Place] | None = None  # cls, json, txt of a sample of a shard; None for a file
    label: int | None = None
    captions: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The picture's name in an error."""
        return str(self.place.file) if self.texts is None else f"{self.place.file}, {self.key}"


@dataclass(frozen=True)
class PictureSet:
    """Pictures in an order of their own, with class names where folders give them."""

    source: Path
    kind: str  # in words, for settings
    pictures: Sequence[Picture]
    classes: tuple[str, ...] | None = None  # names of class folders, by label

    def __len__(self) -> int:
        return len(self.pictures)

    def draw(self, count: int | None, seed: int) -> "PictureSet":
        """`count` pictures drawn at random, in the set's order; all by default."""
        if count is None or count >= len(self):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self)), count))
        return replace(self, pictures=[self.pictures[index] for index in chosen])

    def with_labels(self) -> "PictureSet":
        """The set with each picture's label: its class folder's number, or a shard's `cls` or json `label`.

        Raises:
            ValueError: a picture has none.
        """
        if self.classes is None and any(picture.texts is None for picture in self.pictures):
            raise ValueError(
                f"{self.source} has pictures outside class folders; expected one folder for each class, such "
                "as n01440764/ for ImageNet, or shards with cls"
            )
        if self.classes is not None:
            return self
        return replace(self, pictures=[replace(one, label=_read_label(one)) for one in self.pictures])

    def with_captions(self, language: str) -> "PictureSet":
        """The set with each picture's captions: lines of a shard's `txt`, or json `captions` or `caption`.

        Raises:
            ValueError: a picture has none.
        """
        if all(picture.captions for picture in self.pictures):
            return self
        if any(picture.texts is None for picture in self.pictures):
            raise ValueError(
                f"{self.source} has no captions; expected shards with txt or json, or Karpathy's "
                "dataset_*.json beside the pictures"
            )
        captioned = [replace(one, captions=_read_captions(one, language)) for one in self.pictures]
        return replace(self, pictures=captioned)


def open_pictures(folder: Path) -> PictureSet:
    """The pictures below a folder: picture files, or WebDataset shards, whichever lie there.

    Where all picture files lie in folders, a picture's class is the first folder on its way.

    Raises:
        ValueError: there is neither, both, or a shard that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; expected a folder of pictures, or of WebDataset shards (.tar)")
    shards, files = list_shards(folder), picture_files(folder)
    if bool(shards) == bool(files):
        found = f"both shards ({shards[0]}) and pictures ({files[0]})" if shards else "neither"
        raise ValueError(
            f"{folder} holds {found}; expected pictures ({', '.join(sorted(IMAGE_EXTENSIONS))}) or "
            "WebDataset shards (.tar)"
        )
    if shards:
        pictures = []
        for name in with_progress(shards, "reading shards"):
            prefix = "" if len(shards) == 1 else name.removesuffix(".tar") + "/"
            pictures += _shard_pictures(folder / name, prefix)
        return PictureSet(folder, "WebDataset shards", pictures)
    if any("/" not in name for name in files):
        return PictureSet(folder, "folder", [Picture(name, Place(folder / name)) for name in files])
    of = {name: name.partition("/")[0] for name in files}
    classes = sorted(set(of.values()))
    labels = {name: label for label, name in enumerate(classes)}
    pictures = [Picture(name, Place(folder / name), label=labels[of[name]]) for name in files]
    return PictureSet(folder, "folder of classes", pictures, tuple(classes))


def picture_files(folder: Path) -> list[str]:
    """Names of the picture files at any depth below a folder, sorted; hidden ones are left out."""
    paths = (path for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
    names = (path.relative_to(folder) for path in paths if path.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _shard_pictures(shard: Path, prefix: str) -> list[Picture]:
    """The pictures of a shard by its headers alone; several where a sample has `KEY.0.jpg`, `KEY.1.jpg`."""
    try:
        with open(shard, "rb") as file:
            samples, _ = locate_samples(file)
    except TarError as error:
        raise ValueError(f"{shard} cannot be read: {error}") from None
    found = []
    for sample in samples:
        places = {part: Place(shard, offset, size) for part, offset, size in sample.parts}
        names = image_parts(dict.fromkeys(places, b""))
        texts = {part: places[part] for part in TEXT_PARTS if part in places}
        if not names:
            raise ValueError(f"{shard}, {sample.key}: no picture among its parts {sorted(places)}")
        for index, name in enumerate(names):
            key = sample.key if len(names) == 1 else f"{sample.key}.{index}"
            found.append(Picture(prefix + key, places[name], texts))
    return found


def _read_json(picture: Picture) -> dict:
    texts = picture.texts or {}
    try:
        record = json.loads(texts["json"].read()) if "json" in texts else {}
    except ValueError as error:
        raise ValueError(f"{picture.where}: its json cannot be read ({error})") from None
    return record if isinstance(record, dict) else {}


def _read_label(picture: Picture) -> int:
    texts = picture.texts or {}
    found = (
        texts["cls"].read().decode("utf-8", "replace") if "cls" in texts else _read_json(picture).get("label")
    )
    if isinstance(found, str) and found.strip().isdecimal():
        found = int(found)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(
            f"{picture.where}: its class is {found!r:.40}; expected cls, or label in json, a number from 0"
        )
    return found


def _read_captions(picture: Picture, language: str) -> tuple[str, ...]:
    texts = picture.texts or {}
    record = {} if "txt" in texts else _read_json(picture)
    found = record.get("captions", record.get("caption"))
    if "txt" in texts:
        found = texts["txt"].read().decode("utf-8", "replace").splitlines()
    if isinstance(found, dict):
        if language not in found:
            raise ValueError(f"{picture.where}: captions in {sorted(found)}, none in {language!r}")
        found = found[language]
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(
            f"{picture.where}: its captions are {found!r:.40}; expected text, or a list of texts"
        )
    captions = tuple(text.strip() for text in found if text.strip())
    if not captions:
        raise ValueError(f"{picture.where}: no caption; expected txt, or json with caption or captions")
    return captions
