"""Draws quickstart.png from a finished quickstart: `python docs/figures/result.py [runs/quickstart]`.

The first pictures, none chosen: held-out drawings with their reconstructions.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

COLUMNS = 10


def main(run: Path) -> None:
    """Write the picture beside this file."""
    folder = run / "evaluation" / "reconstruction"
    figure = Figure(figsize=(COLUMNS, 2.2), facecolor="white")
    axes = figure.subplots(2, COLUMNS)
    for column in range(COLUMNS):
        with Image.open(folder / f"{column:05d}.png") as pair:
            side = pair.height
            axes[0, column].imshow(pair.crop((0, 0, side, side)))
            axes[1, column].imshow(pair.crop((side, 0, 2 * side, side)))
    for row, words in enumerate(("held out", "from its codes")):
        axes[row, 0].set_ylabel(words, fontsize=9)
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
        for spine in one.spines.values():
            spine.set_visible(False)
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).parent / "quickstart.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
