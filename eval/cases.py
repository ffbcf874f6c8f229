"""Items of a task to look at: the worst and the best, with small copies of their pictures."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data_pipeline.images.decoding import decode_rgb
from data_pipeline.images.header import BadImageError
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
    """A case with a copy of its picture, at most 256 pixels wide and high, at `path` below `output`.

    The copy looks as models see it; of a picture that cannot be decoded a line says so in its place.
    """
    short = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in lines]
    try:
        pixels = decode_rgb(picture if isinstance(picture, bytes) else picture.read_bytes())
    except (OSError, BadImageError) as error:
        return Case(None, [*short, f"its picture cannot be shown: {error}"], score)
    shown = Image.fromarray(pixels)
    shown.thumbnail((PIXELS, PIXELS))
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.save(path)
    return Case(str(path.relative_to(output)), short, score)
