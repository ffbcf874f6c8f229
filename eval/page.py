"""The page of an evaluation: one table of all tasks, then each task's figures, and its cases as pictures."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eval.comparisons import SIGNIFICANT, luck
from eval.html import PictureFolder, template_environment, write_html
from eval.results import TaskResult

PAGE = "index.html"
ROWS_OPEN = 24  # longer tables are folded


@dataclass(frozen=True)
class ResultRow:
    """A task in the table."""

    task: str
    headline: str
    shown: str  # value with its unit
    chance: str  # what guessing gives, "" where there is no such thing
    verdict: str  # "" where there is no chance to compare with
    won: bool
    count: int


def verdict(result: Mapping[str, Any]) -> tuple[str, bool]:
    """Whether a result is better than guessing, in words; a share only where luck rarely gives as much."""
    value, chance, trials = result["value"], result["chance"], result["trials"]
    if value is None or chance is None:
        return "", False
    if trials:
        by_luck = luck(round(value / 100 * trials), trials, chance / 100)
        if by_luck < SIGNIFICANT:
            return "above chance", True
        return f"not above chance: luck gives as much in {100 * by_luck:.0f} % of cases", False
    better = value > chance if result["higher_is_better"] else value < chance
    return ("better than chance; luck not reckoned" if better else "not better than chance"), better


def shown(value: Any, unit: str = "") -> str:
    """A figure as tables have it: whole numbers whole, others to two decimals, small ones to three digits."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        text = str(value)
    else:
        text = f"{value:.2f}" if value == 0 or 0.1 <= abs(value) < 1e6 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def result_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[ResultRow]:
    """The table's rows, in the order of `results.json`."""
    rows = []
    for name, result in tasks.items():
        words, won = verdict(result)
        unit = result["unit"]
        chance = "" if result["chance"] is None else shown(result["chance"], unit)
        value = shown(result["value"], unit)
        rows.append(ResultRow(name, result["headline"], value, chance, words, won, result["count"]))
    return rows


def settings_of(result: Mapping[str, Any]) -> dict[str, str]:
    """What a result was measured with: its settings, and what stands beside them in `results.json`."""
    own = {field.name for field in fields(TaskResult)}
    found: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                add(f"{name}, {key}", part)
        else:
            found[name] = "none" if value is None else str(value)

    beside = {name: value for name, value in result.items() if name not in own}
    for name, value in {**result["settings"], **beside}.items():
        add(name, value)
    return found


def write_page(output: Path, results: Mapping[str, Any]) -> Path:
    """Write `index.html` into an evaluation's folder and return its path.

    The page is one file: pictures are inside, nothing is loaded from elsewhere.

    Args:
        output: the folder, below which the cases' pictures lie.
        results: the content of `results.json`.

    Raises:
        ImportError: jinja2 is missing.
        ValueError: a case names a picture outside the folder.
        FileNotFoundError: a case's picture is gone.
    """
    environment = template_environment()
    environment.filters["shown"] = shown
    tasks = results["tasks"]
    text = environment.get_template("page.html.jinja").render(
        name=output.resolve().name,
        written_at=time.strftime("%Y-%m-%d %H:%M"),
        tasks=tasks,
        rows=result_rows(tasks),
        settings={name: settings_of(result) for name, result in tasks.items()},
        picture=PictureFolder(output),
        rows_open=ROWS_OPEN,
    )
    write_html(output / PAGE, text)
    return output / PAGE
