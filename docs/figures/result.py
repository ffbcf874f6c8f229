"""Draws quickstart.png from a finished quickstart: `python docs/figures/result.py [runs/quickstart]`.

The first pictures of each list, none chosen: held-out drawings with their reconstructions, and what the
unified model drew for names of its training set.
"""

import json
import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

COLUMNS = 10
GUIDANCE = "1.5"


def main(run: Path) -> None:
    """Write the picture beside this file."""
    results = run / "evaluation"
    generation = json.loads((results / "generation.json").read_text(encoding="utf-8"))
    drawn = generation["pictures"]["seen"]["prompts"][:COLUMNS]
    figure = Figure(figsize=(COLUMNS, 4.1), facecolor="white")
    axes = figure.subplots(3, COLUMNS)
    for column, prompt in enumerate(drawn):
        with Image.open(results / "reconstruction" / f"{column:05d}.png") as pair:
            side = pair.height
            axes[0, column].imshow(pair.crop((0, 0, side, side)))
            axes[1, column].imshow(pair.crop((side, 0, 2 * side, side)))
        with Image.open(results / prompt["pictures"][GUIDANCE]) as picture:
            axes[2, column].imshow(picture)
        axes[2, column].set_xlabel("\n".join(textwrap.wrap(prompt["prompt"], 15)), fontsize=8)
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
