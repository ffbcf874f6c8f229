"""`dualtoken ablate`: variants of a model trained over seeds, measured, and compared in a table."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.variants import Figure, Trainings, rows_of, train_all, write_table


@dataclass(frozen=True)
class Ordering:
    """A claim of the paper: one variant is above another in a figure."""

    above: str
    below: str
    key: str
    claim: str


@dataclass(frozen=True, kw_only=True)
class Ablation(Trainings):
    """A comparison of the paper's: variants, what is measured of them, and what is claimed."""

    kind: str = "ablation"
    recipe: str
    figures: Sequence[Figure]
    orderings: Sequence[Ordering]
    steps: int  # optimizer steps of each training
    chance: str = "by chance"  # title of the row of chances


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
    runs = train_all(ablation, output, seeds, ranks, say)
    rows = rows_of(ablation.variants, runs, ablation.figures)
    verdicts = orderings(ablation.orderings, {row["name"]: row for row in rows})
    rows += chance_rows(ablation, [run.figures for run in runs if run.figures is not None])
    content = {"steps": ablation.steps, "seeds": seeds, "rows": rows, "orderings": verdicts}
    summary = f"{ablation.steps} steps, {seeds} seed(s); spread: standard deviation."
    write_table(ablation.kind, output, ablation.figures, content, [summary, *verdicts], say)
    return rows


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
