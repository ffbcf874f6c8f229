"""What benchmarks put into their files, and writing it: pictures, objects, tables."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.sources.scenes.pictures import encoded
from data_pipeline.sources.scenes.questions import Fact

# Chroma in full: a scene's small drawings differ by their colours.
_JPEG = {"quality": 90, "subsampling": "4:4:4"}


@dataclass(frozen=True, eq=False)
class Shown:
    """A fact with the picture that it is true of."""

    fact: Fact
    picture: Image.Image


def picture_file(picture: Image.Image, form: str) -> bytes:
    """A picture as `PNG` or `JPEG`."""
    return encoded(picture, form, **(_JPEG if form == "JPEG" else {}))


def write_picture(path: Path, picture: Image.Image, form: str) -> None:
    """A picture as a file, `PNG` or `JPEG`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_file(picture, form))


def in_base64(picture: Image.Image) -> str:
    """A picture as JPEG, for a field of a table."""
    return base64.b64encode(picture_file(picture, "JPEG")).decode("ascii")


def write_text(path: Path, text: str) -> None:
    """Text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Anything as JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """An object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same fields as a tab-separated table with a head; no file without rows."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
