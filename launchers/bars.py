"""Rows of a table as bars, a panel for each figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.variants import Figure

WIDTH, BAR = 7.0, 0.28  # inches


def plot_bars(rows: Sequence[dict[str, Any]], figures: Sequence[Figure], path: Path) -> None:
    """Draw rows as `rows_of` makes them, one bar a row, and save the picture.

    A line at a bar's end is the standard deviation over the seeds; a row without a figure has no bar.

    Args:
        rows: of the table.
        figures: what is drawn, a panel each.
        path: of the PNG.
    """
    from matplotlib.figure import Figure as Canvas

    columns = 2
    lines = -(-len(figures) // columns)
    size = (columns * WIDTH, lines * (BAR * len(rows) + 0.9))
    canvas = Canvas(figsize=size, layout="constrained")
    names = [row["meaning"] for row in rows]
    panels = canvas.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, figure in zip(panels, figures, strict=False):
        for place, row in enumerate(rows):
            found = row[figure.key]
            if found is None:
                continue
            mean, spread = found["mean"] * figure.scale, (found["spread"] or 0.0) * figure.scale
            axes.barh(place, mean, xerr=spread or None, color=f"C{place}", height=0.7)
            axes.annotate(
                f"{mean:.{figure.digits}f}", (mean + spread, place), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize="small",
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), names)
        axes.set_title(figure.title, fontsize="medium")
        axes.margins(x=0.15)
        axes.set_xlim(left=0)
    for axes in list(canvas.axes)[len(figures) :]:
        axes.set_axis_off()
    canvas.axes[0].invert_yaxis()  # the first row on top, in all panels
    canvas.savefig(path, dpi=110)
