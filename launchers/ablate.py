"""`dualtoken ablate`: variants of a model trained over seeds, measured, and compared in a table."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.results import read_json, write_json
from launchers import processes
from launchers.errors import UserError


@dataclass(frozen=True)
class Variant:
    """One way to build the model."""

    name: str
    meaning: str
    words: tuple[str, ...]  # settings that differ from the recipe's
    left_out: tuple[str, ...] = ()  # figures that say nothing of it


@dataclass(frozen=True)
class Figure:
    """One column of the table."""

    key: str
    title: str
    scale: float
    digits: int
    chance: str = ""  # which of the measured values guessing would have


@dataclass(frozen=True)
class Ordering:
    """A claim of the paper: one variant is above another in a figure."""

    above: str
    below: str
    key: str
    claim: str


@dataclass(frozen=True)
class Ablation:
    """What is compared: everything that differs from one model to another."""

    recipe: str
    variants: Sequence[Variant]
    figures: Sequence[Figure]
    orderings: Sequence[Ordering]
    steps: int  # optimizer steps of each training
    settings: Callable[[Path, int], list[str]]  # words of a training in a folder with a seed
    measure: Callable[[Path], dict[str, float]]  # figures of the training in a folder
    chance: str = "by chance"  # title of the row of chances
    made_from: Mapping[str, str] = field(default_factory=dict)  # fingerprints of what the trainings read


def ablate(
    ablation: Ablation, output: Path, seeds: int, ranks: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Train and measure every variant with every seed; write the table.

    A run that is done is not repeated. Writes `ablation.json` and `ablation.md` in `output`.

    Args:
        ablation: what is compared.
        output: folder for the runs and the table.
        seeds: trainings of each variant.
        ranks: processes of a training.
        say: called with each line for the user.

    Returns:
        the rows of the table, with mean and spread (standard deviation over seeds) of every figure; at the
        end, where chances are known, their row.

    Raises:
        UserError: a training failed, or `output` holds one with other settings.
    """
    results: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in ablation.variants}
    for seed in range(seeds):
        for variant in ablation.variants:
            folder = output / f"{variant.name}-seed{seed}"
            words = [*ablation.settings(folder, seed), *variant.words]
            asked = {"words": words, "made_from": dict(ablation.made_from)}
            figures = read_json(folder / "ablation.json")
            _require_same(folder, figures, asked)
            if figures is None:
                say(f"{variant.name}, seed {seed}: {variant.meaning}")
                figures = _train_and_measure(folder, asked, ranks, ablation)
            results[variant.name].append(figures)
    rows = [_row(variant, results[variant.name], ablation.figures) for variant in ablation.variants]
    verdicts = orderings(ablation.orderings, {row["name"]: row for row in rows})
    rows += chance_rows(ablation, [one for runs in results.values() for one in runs])
    content = {"steps": ablation.steps, "seeds": seeds, "rows": rows, "orderings": verdicts}
    write_json(output / "ablation.json", content)
    table = [*table_lines(rows, ablation.figures), ""]
    table += [f"{ablation.steps} steps, {seeds} seed(s); spread: standard deviation.", ""]
    table += [f"- {verdict}" for verdict in verdicts]
    (output / "ablation.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    for line in table:
        say(line)
    say(f"written: {output / 'ablation.md'}, {output / 'ablation.json'}")
    return rows


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


def _train_and_measure(folder: Path, asked: dict[str, Any], ranks: int, ablation: Ablation) -> dict:
    """Train one variant with one seed; measure it and keep the figures in its folder."""
    write_json(folder / "asked.json", asked)
    finished = processes.run(processes.deepspeed_command("pretrain.train", asked["words"], ranks), ranks)
    if finished.returncode or not (folder / "done.json").is_file():
        raise UserError(f"the training in {folder} failed; see above, then start this again")
    figures = {**asked, **ablation.measure(folder)}
    write_json(folder / "ablation.json", figures)
    return figures


def _row(variant: Variant, runs: Sequence[dict[str, float]], figures: Sequence[Figure]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": variant.name, "meaning": variant.meaning}
    for figure in figures:
        if figure.key in variant.left_out:
            row[figure.key] = None
            continue
        values = [one[figure.key] for one in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        row[figure.key] = {"mean": statistics.mean(values), "spread": spread, "values": values}
    return row


def chance_rows(ablation: Ablation, runs: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """The row of what guessing gives, its mean over all runs; none where no figure has a chance."""
    if not any(figure.chance for figure in ablation.figures):
        return []
    row: dict[str, Any] = {"name": "chance", "meaning": ablation.chance}
    for figure in ablation.figures:
        row[figure.key] = None
        if figure.chance:
            values = [one[figure.chance] for one in runs]
            row[figure.key] = {"mean": statistics.mean(values), "spread": None, "values": values}
    return [row]


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


def orderings(claims: Sequence[Ordering], rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """Say which of the paper's orderings appear, and whether beyond twice the standard error."""
    return [_verdict(one, rows[one.above][one.key], rows[one.below][one.key]) for one in claims]


def _verdict(ordering: Ordering, above: dict[str, Any], below: dict[str, Any]) -> str:
    difference = above["mean"] - below["mean"]
    spreads = [one["spread"] for one in (above, below)]
    if None in spreads:
        sure = "one seed: no spread known"
    else:
        error = (sum(spread**2 for spread in spreads) / len(above["values"])) ** 0.5
        sure = "beyond the spread" if abs(difference) > 2 * error else "within the spread"
    appears = "appears" if difference > 0 else "does not appear"
    return f"{ordering.claim}: {appears} ({difference:+.3g}, {sure})"
