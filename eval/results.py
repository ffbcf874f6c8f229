"""What a task of `dualtoken evaluate` found, as JSON files; light to import: the report comes at once."""

import fcntl
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
RESULTS_FILE = "results.json"
PACKAGES = (
    "dualtoken",
    "torch",
    "torchvision",
    "transformers",
    "nvidia-dali-cuda130",
    "lpips",
    "open_clip_torch",
)


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
    trials: int | None = None  # where the value is a share: of how many, to tell it from luck
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


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # DALI for another CUDA has another name
            continue
    return found


def record(output: Path, result: TaskResult, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Add a result to the folder's `results.json`, in place of an earlier one of its task; returns all of it.

    Args:
        output: the evaluation's folder; several processes may do so at a time.
        result: what was found now.
        provenance: what it was measured with: paths and fingerprints of models.

    Raises:
        ValueError: the file there is of another format.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / RESULTS_FILE
    with open(output / ".results.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = read_json(path) or {"format_version": FORMAT_VERSION, "tasks": {}}
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format {content.get('format_version')!r}, expected {FORMAT_VERSION}; "
                "choose another --out"
            )
        content["tasks"][result.task] = {
            **result.as_json(),
            "recorded": time.time(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(),
            **provenance,
        }
        write_json(path, content)
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a result so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.rename(path)


def read_json(path: Path) -> dict | None:
    """Read a JSON file; None if it is not there.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove it and have it made again") from None
