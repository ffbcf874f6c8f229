"""Items of a task to look at: the worst and the best, with small copies of their pictures."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from eval.results import Case

CASES = 6  # worst and best ones shown
PIXELS = 256
LONGEST_LINE = 300


def extremes(scores: Sequence[float]) -> tuple[list[int], list[int]]:
    """Places of the worst and of the best scores, each from its end; none is in both.

    Perfect ones are not among the worst, and those of score 0 not among the best.
    """
    order = sorted(range(len(scores)), key=scores.__getitem__)
    half = len(order) // 2
    worst = [place for place in order[: min(CASES, len(order) - half)] if scores[place] < 1]
    best = [place for place in order[::-1][: min(CASES, half)] if scores[place] > 0]
    return worst, best


def make_case(picture: Path | bytes, lines: Sequence[str], score: float, path: Path, output: Path) -> Case:
    """A case with a copy of its picture, at most 256 pixels wide and high, at `path` below `output`."""
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
        shown = image.convert("RGB")
    shown.thumbnail((PIXELS, PIXELS))
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.save(path)
    short = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in lines]
    return Case(str(path.relative_to(output)), short, score)
