"""What a task of `dualtoken evaluate` found, as JSON files; light to import: the report comes at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One item of a task to look at: its picture, what was asked and answered, and how good that was."""

    picture: str | None  # path below the output folder
    lines: list[str]
    score: float  # of this item, higher is better


@dataclass(frozen=True)
class TaskResult:
    """What a task found; one row of the table, one section of the page, one entry of results.json."""

    task: str
    headline: str  # name of the figure in the table, such as "F1"
    value: float | None  # None where the data hold no truth: answers and submission are there all the same
    unit: str  # "%", "dB", ""
    count: int  # items measured
    higher_is_better: bool = True
    chance: float | None = None  # what guessing gives, in the same unit
    figures: Mapping[str, float | None] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # title -> rows
    worst: Sequence[Case] = ()
    best: Sequence[Case] = ()
    files: Sequence[str] = ()  # written beside, paths below the output folder
    notes: Sequence[str] = ()  # what a reader has to know, such as questions without an answer
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict:
        """The result for results.json."""
        return asdict(self)


def write_json(path: Path, content: dict) -> None:
    """Write a result so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.rename(path)


def read_json(path: Path) -> dict | None:
    """Read a JSON file; None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
