"""Draws quickstart.png from a finished quickstart: `python docs/figures/result.py [runs/quickstart]`.

The first pictures of each list, none chosen: held-out drawings with their reconstructions, and what the
unified model drew for scenes of combinations it never saw.
"""

import json
import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

COLUMNS = 10


def main(run: Path) -> None:
    """Write the picture beside this file."""
    results = run / "evaluation"
    scenes = json.loads((results / "scenes.json").read_text(encoding="utf-8"))["splits"]["held_out"]
    drawn = [row for row in scenes["drawn"]["rows"] if row["language"] == "en"][:COLUMNS]
    figure = Figure(figsize=(COLUMNS, 4.3), facecolor="white")
    axes = figure.subplots(3, COLUMNS)
    for column, prompt in enumerate(drawn):
        with Image.open(results / "reconstruction" / f"{column:05d}.png") as pair:
            side = pair.height
            axes[0, column].imshow(pair.crop((0, 0, side, side)))
            axes[1, column].imshow(pair.crop((side, 0, 2 * side, side)))
        with Image.open(results / prompt["picture"]) as picture:
            axes[2, column].imshow(picture)
        axes[2, column].set_xlabel("\n".join(textwrap.wrap(prompt["prompt"], 17)), fontsize=7.5)
    for row, words in enumerate(("held out", "from its codes", "drawn for")):
        axes[row, 0].set_ylabel(words, fontsize=9)
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
        for spine in one.spines.values():
            spine.set_visible(False)
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).parent / "quickstart.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
