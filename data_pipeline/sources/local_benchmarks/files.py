"""Writing the files of a benchmark."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.sources.local_benchmarks.scenes import Scene


def write_picture(path: Path, scene: Scene, form: str) -> None:
    """A scene as `PNG` or `JPEG`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(scene.encoded(form))


def in_base64(scene: Scene) -> str:
    """A scene as JPEG, for a field of a table."""
    return base64.b64encode(scene.encoded("JPEG")).decode("ascii")


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
