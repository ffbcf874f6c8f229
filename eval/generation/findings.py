"""What one way of scoring found of a task's pictures; a task's result is put together from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.cases import extremes, make_case
from eval.generation.drawing import Drawing
from eval.results import Case


@dataclass(frozen=True)
class Finding:
    """Figures by one judge, one comparison or one scorer."""

    headline: str  # name of its main figure
    value: float | None
    figures: Mapping[str, float | None]
    unit: str = ""
    higher_is_better: bool = True
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)  # of each picture, by place, in [0, 1]
    remarks: Mapping[str, str] = field(default_factory=dict)  # on a picture, by place
    notes: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # what it was scored by


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


def cases(finding: Finding, drawings: Sequence[Drawing], output: Path, folder: Path) -> dict[str, list[Case]]:
    """The worst and the best pictures by a finding, copied into `folder` below `output`."""
    scored = [one for one in drawings if one.place in finding.scores]
    chosen = extremes([finding.scores[one.place] for one in scored])
    return {
        name: [
            make_case(
                scored[place].path,
                [f"prompt: {scored[place].prompt.text}", finding.remarks.get(scored[place].place, "")],
                finding.scores[scored[place].place],
                folder / name / f"{index:02d}.png",
                output,
            )
            for index, place in enumerate(places)
        ]
        for name, places in zip(("worst", "best"), chosen, strict=True)
    }
