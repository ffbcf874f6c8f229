"""Variants of a recipe trained over seeds, one after the other, resumable; the table that compares them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.results import read_json, write_json
from launchers import processes
from launchers.errors import UserError

UNDER_WAY = "under_way.json"  # the session of the training under way, to find what a kill leaves behind
MISTAKE = 2  # exit code of a training whose settings or inputs are wrong: the next would fail likewise


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    name: str  # also of its folders
    meaning: str
    words: tuple[str, ...]  # settings that differ from the recipe's
    left_out: tuple[str, ...] = ()  # figures that say nothing of it
    made_from: Mapping[str, str] = field(default_factory=dict)  # fingerprints of what it alone reads


@dataclass(frozen=True)
class Figure:
    """One column of the table."""

    key: str
    title: str
    scale: float
    digits: int
    chance: str = ""  # which of the measured values guessing would have


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """What is trained and measured: everything that differs from one variant to another."""

    kind: str  # names the files: KIND.json, KIND.md
    variants: Sequence[Variant]
    settings: Callable[[Path, int], list[str]]  # words of a training in a folder with a seed
    measure: Callable[[Path], dict[str, float]]  # figures of the training in a folder
    made_from: Mapping[str, str] = field(default_factory=dict)  # fingerprints of what the trainings read
    keeps_going: bool = False  # a training that fails is left out, the others are made all the same


@dataclass(frozen=True)
class Run:
    """One training."""

    variant: Variant
    seed: int
    folder: Path
    figures: dict[str, float] | None  # None: it failed


def train_all(
    trainings: Trainings, output: Path, seeds: int, ranks: int, say: Callable[[str], None]
) -> list[Run]:
    """Train and measure every variant with every seed.

    A run that is done is not repeated, one that was broken off goes on from its checkpoint.

    Args:
        trainings: what is compared.
        output: folder for the runs.
        seeds: trainings of each variant.
        ranks: processes of a training.
        say: called with each line for the user.

    Raises:
        UserError: a training failed (with `keeps_going`: by a mistake in its settings) or was stopped;
            `output` holds one with other settings, or is at work.
    """
    output.mkdir(parents=True, exist_ok=True)
    with processes.only_one(output, trainings.kind, "--out"):
        _end_leftovers(output, say)
        asked, runs = {}, []
        for seed in range(seeds):
            for variant in trainings.variants:
                folder = output / f"{variant.name}-seed{seed}"
                words = [*trainings.settings(folder, seed), *variant.words]
                asked[folder] = {"words": words, "made_from": {**trainings.made_from, **variant.made_from}}
                figures = read_json(folder / f"{trainings.kind}.json")
                _require_same(folder, figures, asked[folder])
                runs.append(Run(variant, seed, folder, figures))
        for place, run in enumerate(runs):
            if run.figures is None:
                say(f"[{place + 1}/{len(runs)}] {run.variant.name}, seed {run.seed}: {run.variant.meaning}")
                figures = _train_and_measure(run.folder, asked[run.folder], ranks, trainings)
                runs[place] = replace(run, figures=figures)
    return runs


def _end_leftovers(output: Path, say: Callable[[str], None]) -> None:
    """End a training that goes on although who started it was killed: two in one folder would spoil it."""
    left = read_json(output / UNDER_WAY)
    if left is not None and (count := processes.end_session(left["session"], left["started"] - 1)):
        say(f"ended {count} processes that a killed run had left behind")
    (output / UNDER_WAY).unlink(missing_ok=True)


def _require_same(folder: Path, figures: dict | None, asked: dict[str, Any]) -> None:
    """Raise UserError if a run was asked for otherwise: trained on, it would be neither of the two."""
    before = figures or read_json(folder / "asked.json")
    if before is None:
        return
    found = {"words": before["words"], "made_from": before.get("made_from", {})}
    if found == asked:
        return
    words = [word for word in found["words"] if word not in asked["words"]]
    difference = ", ".join(words) or "fewer settings"
    if found["words"] == asked["words"]:
        difference = (
            ", ".join(f"{name} {value}" for name, value in found["made_from"].items()) or "other data"
        )
    raise UserError(
        f"{folder} holds a run with {difference}, which is not what is asked for now; choose another --out, "
        "or remove that folder to make it anew"
    )


def _train_and_measure(folder: Path, asked: dict[str, Any], ranks: int, trainings: Trainings) -> dict | None:
    """Train one variant with one seed; measure it and keep the figures in its folder; None if it failed."""
    write_json(folder / "asked.json", asked)
    under_way, started = folder.parent / UNDER_WAY, time.time()
    command = processes.training_command(asked["words"], ranks)
    try:
        finished = processes.run(
            command, ranks, lambda session: write_json(under_way, {"session": session, "started": started})
        )
    finally:
        under_way.unlink(missing_ok=True)
    # Exit code 0 without a result: it was stopped, or the launcher does not tell of a rank that was killed.
    if finished.returncode or not (folder / "done.json").is_file():
        if trainings.keeps_going and finished.returncode not in (0, MISTAKE):
            return None
        ended = "failed; see above, then" if finished.returncode else "was stopped;"
        raise UserError(f"the training in {folder} {ended} start this again")
    figures = {**asked, **trainings.measure(folder)}
    write_json(folder / f"{trainings.kind}.json", figures)
    return figures


def rows_of(
    variants: Sequence[Variant], runs: Sequence[Run], figures: Sequence[Figure]
) -> list[dict[str, Any]]:
    """Rows of the table, a variant each: mean and spread (standard deviation over seeds) of every figure.

    A figure is None where the variant leaves it out or none of its runs has been finished.
    """
    done: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
    for run in runs:
        if run.figures is not None:
            done[run.variant.name].append(run.figures)
    return [_row(variant, done[variant.name], figures) for variant in variants]


def _row(variant: Variant, runs: Sequence[dict[str, float]], figures: Sequence[Figure]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": variant.name, "meaning": variant.meaning}
    for figure in figures:
        if figure.key in variant.left_out or not runs:
            row[figure.key] = None
            continue
        values = [one[figure.key] for one in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        row[figure.key] = {"mean": statistics.mean(values), "spread": spread, "values": values}
    return row


def table_lines(rows: Sequence[dict[str, Any]], figures: Sequence[Figure]) -> list[str]:
    """The table in Markdown."""
    lines = [
        "| variant | " + " | ".join(figure.title for figure in figures) + " |",
        "|---|" + "---|" * len(figures),
    ]
    for row in rows:
        cells = []
        for figure in figures:
            found = row[figure.key]
            if found is None:
                cells.append("-")
                continue
            text = f"{found['mean'] * figure.scale:.{figure.digits}f}"
            if found["spread"] is not None:
                text += f" ± {found['spread'] * figure.scale:.{figure.digits}f}"
            cells.append(text)
        lines.append(f"| {row['meaning']} | " + " | ".join(cells) + " |")
    return lines


def write_table(
    kind: str,
    output: Path,
    figures: Sequence[Figure],
    content: dict[str, Any],
    notes: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Write the rows of `content` as KIND.md, with notes below, and all of it as KIND.json; say the table."""
    write_json(output / f"{kind}.json", content)
    table = [*table_lines(content["rows"], figures), "", notes[0], "", *(f"- {note}" for note in notes[1:])]
    (output / f"{kind}.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    for line in table:
        say(line)
    say(f"written: {output / f'{kind}.md'}, {output / f'{kind}.json'}")
