"""Draws quickstart.png from a finished quickstart: `python docs/figures/result.py [runs/quickstart]`.

The first pictures, none chosen: held-out drawings with their reconstructions, and held-out scenes drawn from
their captions.
"""

import json
import sys
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

COLUMNS = 10
RIGHT, WRONG = "tab:green", "lightgrey"  # frames of drawn scenes, by the detector


def main(run: Path) -> None:
    """Write the picture beside this file."""
    evaluation = run / "evaluation"
    figure = Figure(figsize=(COLUMNS, 4.1), facecolor="white")
    axes = figure.subplots(3, COLUMNS, gridspec_kw={"height_ratios": (1, 1, 1.1)})
    for column in range(COLUMNS):
        with Image.open(evaluation / "reconstruction" / f"{column:05d}.png") as pair:
            side = pair.height
            _show(axes[0, column], pair.crop((0, 0, side, side)))
            _show(axes[1, column], pair.crop((side, 0, 2 * side, side)))
    scenes = json.loads((evaluation / "scenes.json").read_text(encoding="utf-8"))
    for column, row in enumerate(scenes["splits"]["held_out"]["drawn"]["rows"][:COLUMNS]):
        with Image.open(evaluation / row["picture"]) as picture:
            _show(axes[2, column], picture, RIGHT if row["right"]["all"] else WRONG)
        axes[2, column].set_xlabel("\n".join(textwrap.wrap(row["prompt"], 17)), fontsize=6.5)
    for row, words in enumerate(("held out", "from its codes", "drawn")):
        axes[row, 0].set_ylabel(words, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).parent / "quickstart.png", dpi=100)


def _show(axis: Axes, picture: Image.Image, frame: str | None = None) -> None:
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=frame is not None, color=frame, linewidth=2)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
