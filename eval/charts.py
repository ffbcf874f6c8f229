"""Small charts as SVG text, coloured by the page's style sheet so that they follow light and dark."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]
MAX_POINTS = 120  # of a line; more are averaged in bins


@dataclass
class Series:
    """One line of a chart; `style` is a CSS class of the page."""

    name: str
    points: list[Point]
    style: str = "a"
    dots: bool = False  # mark every point, for lines of few points


@dataclass
class _Frame:
    """Where data coordinates lie in the picture."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: int = 44
    right: int = 12
    top: int = 10
    bottom: int = 22
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low or 1) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return (
            self.height
            - self.bottom
            - (value - low) / (high - low or 1) * (self.height - self.top - self.bottom)
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start", style: str = "tick") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
            f'class="{style}">{html.escape(words)}</text>'
        )

    def svg(self, label: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" style="max-width:{1.5 * self.width:.0f}px" '
            f'role="img" aria-label="{html.escape(label)}">{"".join(self.parts)}</svg>'
        )


def thin_out(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points, each the mean of a run of neighbours."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return list(points)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def ticks(low: float, high: float, count: int = 3) -> list[float]:
    """About `count` round values between two ends."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters."""
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def line_chart(
    label: str,
    series: Sequence[Series],
    width: int = 300,
    height: int = 150,
    level: tuple[str, float] | None = None,
    x_values: Sequence[float] | None = None,
) -> str:
    """Lines over a common axis.

    Args:
        label: what a screen reader says.
        series: the lines.
        width: of the picture.
        height: of the picture.
        level: name and value of a dashed horizontal line to compare with.
        x_values: where to put ticks on the x axis; round ones by default.
    """
    drawn = [Series(s.name, thin_out(s.points), s.style, s.dots) for s in series if s.points]
    if not drawn:
        return ""
    x_all = [x for s in drawn for x, _ in s.points]
    y_all = [y for s in drawn for _, y in s.points] + ([level[1]] if level else [])
    low, high = min(y_all), max(y_all)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    frame = _Frame(width, height, (min(x_all), max(x_all)), (low - margin, high + margin))
    for value in ticks(low - margin, high + margin):
        y = frame.y(value)
        frame.parts.append(
            f'<line x1="{frame.left}" x2="{width - frame.right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        )
        frame.text(frame.left - 6, y + 3.5, short(value), "end")
    for value in x_values if x_values is not None else ticks(min(x_all), max(x_all), 5):
        anchor = "end" if frame.x(value) > width - frame.right - 12 else "middle"
        frame.text(min(frame.x(value), width - 2), height - 6, short(value), anchor)
    if level:
        y = frame.y(level[1])
        frame.parts.append(
            f'<line x1="{frame.left}" x2="{width - frame.right}" y1="{y:.1f}" y2="{y:.1f}" class="level"/>'
        )
        frame.text(width - frame.right, y - 4, level[0], "end")
    for s in drawn:
        places = [(frame.x(x), frame.y(y)) for x, y in s.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        frame.parts.append(f'<polyline points="{path}" class="line {s.style}"/>')
        if s.dots or len(places) == 1:
            for (x, y), (_, value) in zip(places, s.points, strict=True):
                frame.parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" class="dot {s.style}">'
                    f"<title>{html.escape(s.name)} {short(value)}</title></circle>"
                )
    return frame.svg(label)


def heatmap(label: str, matrix: Sequence[Sequence[float]], names: Sequence[str], cell: int = 34) -> str:
    """A square matrix of values from its least (pale) to its greatest (full colour), numbers inside."""
    values = [value for row in matrix for value in row]
    low, high = min(values), max(values)
    size = len(matrix)
    side = size * cell
    frame = _Frame(side + 34, side + 24, (0, 1), (0, 1))
    for i, row in enumerate(matrix):
        frame.text(26, i * cell + cell / 2 + 3.5, names[i], "end")
        frame.text(32 + i * cell + cell / 2, side + 15, names[i], "middle")
        for j, value in enumerate(row):
            share = (value - low) / (high - low or 1)
            x, y = 32 + j * cell, i * cell
            frame.parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" rx="2" class="cell" '
                f'style="fill-opacity:{0.06 + 0.94 * share:.3f}"><title>layers {names[i]} and {names[j]}: '
                f"{value:.3f}</title></rect>"
            )
            if cell >= 24:
                style = "cell-text strong" if share > 0.55 else "cell-text"
                frame.text(x + cell / 2, y + cell / 2 + 3.5, f"{value:.2f}", "middle", style)
    return frame.svg(label)
