"""Draws the figures of the documents, for light and dark pages: `python docs/figures/draw.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

THEMES = {
    "light": {
        "page": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "line": "#59636e", "plain": "#f6f8fa",
        "pixel": "#ffe2c4", "semantic": "#d3e4ff", "text": "#dff3df", "frozen": "#eceef0",
    },
    "dark": {
        "page": "#0d1117", "ink": "#f0f6fc", "faint": "#9198a1", "line": "#9198a1", "plain": "#1b222c",
        "pixel": "#6a3d12", "semantic": "#1d3f73", "text": "#1f4d2b", "frozen": "#2d333b",
    },
}  # fmt: skip
FONT = "font-family=\"-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""


@dataclass
class Drawing:
    """An SVG that grows by boxes, words and arrows; coordinates in pixels."""

    width: int
    height: int
    colours: dict[str, str]
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, words: str, fill: str = "plain", size: int = 13):
        """A rectangle with centred words, a line for each line of `words`; later ones are smaller."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{self.colours[fill]}" '
            f'stroke="{self.colours["line"]}"/>'
        )
        lines = words.split("\n") if words else []
        top = y + h / 2 - 8.5 * (len(lines) - 1)
        for number, line in enumerate(lines):
            style = (size, "ink") if number == 0 else (size - 2, "faint")
            self.words(x + w / 2, top + 17 * number + 4.5, line, *style, anchor="middle")

    def words(self, x: float, y: float, line: str, size: int = 13, colour="ink", anchor="start", bold=False):
        """One line of text."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{self.colours[colour]}" '
            f'text-anchor="{anchor}"{weight}>{escape(line)}</text>'
        )

    def arrow(self, *points: tuple[float, float], label: str = "", dashed: bool = False):
        """A line through points, with a head at its end and a label above the middle of its first part."""
        way = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{way}" fill="none" stroke="{self.colours["line"]}" stroke-width="1.5"{dash} '
            'marker-end="url(#head)"/>'
        )
        if label:
            (x0, y0), (x1, y1) = points[:2]
            self.words((x0 + x1) / 2, (y0 + y1) / 2 - 6, label, 11, "faint", anchor="middle")

    def svg(self, title: str) -> str:
        """The file's text."""
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" {FONT} role="img">\n'
            f"<title>{escape(title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0,0 L8,4 L0,8 z" fill="{self.colours["line"]}"/></marker>'
            f'</defs>\n<rect width="{self.width}" height="{self.height}" fill="{self.colours["page"]}"/>\n'
            f"{body}\n</svg>\n"
        )


def architecture(colours: dict[str, str]) -> str:
    """Both models: the visual tokenizer above, the unified model that reads and writes its codes below."""
    d = Drawing(960, 560, colours)
    d.words(20, 30, "Stage 1: visual tokenizer", 15, bold=True)
    d.words(250, 30, "a picture becomes two grids of codes, and comes back from them", 12, "faint")
    d.box(20, 105, 70, 70, "picture")
    d.arrow((90, 140), (120, 140))
    d.box(120, 60, 100, 160, "")
    d.words(170, 80, "SigLIP tower", 12, anchor="middle")
    for layer in range(9):
        colour = {2: "pixel", 7: "semantic"}.get(layer, "plain")
        y = 204 - 13 * layer
        d.parts.append(
            f'<rect x="132" y="{y}" width="76" height="10" rx="2" fill="{colours[colour]}" '
            f'stroke="{colours["line"]}" stroke-width="0.7"/>'
        )
    d.arrow((208, 118), (250, 95), (285, 95))
    d.words(252, 87, "layer 26", 11, "faint", anchor="middle")
    d.arrow((208, 183), (250, 187), (285, 187))
    d.words(252, 203, "layer 6", 11, "faint", anchor="middle")
    for y, kind, what in ((70, "semantic", "semantic codebook"), (162, "pixel", "pixel codebook")):
        d.box(285, y, 90, 50, "projection\nbefore")
        d.arrow((375, y + 25), (400, y + 25))
        d.box(400, y, 150, 50, f"{what}\nresidual VQ, depth D", kind)
        d.arrow((550, y + 25), (575, y + 25))
        d.box(575, y, 90, 50, "projection\nafter")
    d.arrow((665, 95), (700, 95))
    d.box(700, 70, 120, 50, "last layers\npooled features")
    d.arrow((820, 95), (850, 95), dashed=True)
    d.box(850, 70, 90, 50, "frozen\nteacher", "frozen")
    d.arrow((665, 187), (700, 187))
    d.parts.append(
        f'<polyline points="682,95 682,187" fill="none" stroke="{colours["line"]}" stroke-width="1.5"/>'
    )
    d.box(700, 162, 120, 50, "pixel decoder\nof both branches")
    d.arrow((820, 187), (850, 187))
    d.box(850, 152, 90, 70, "picture\nagain")
    d.words(850, 243, "MSE, LPIPS, GAN", 11, "faint")
    d.words(850, 58, "distillation", 11, "faint")
    for y, kind in ((232, "semantic"), (247, "pixel")):
        for column in range(12):
            d.parts.append(
                f'<rect x="{403 + 12 * column}" y="{y}" width="10" height="10" rx="2" '
                f'fill="{colours[kind]}" stroke="{colours["line"]}" stroke-width="0.7"/>'
            )
    d.words(395, 250, "codes of a picture", 11, "faint", anchor="end")
    d.arrow((475, 262), (475, 300), dashed=True)
    d.words(485, 286, "pretokenize: once, for all pictures", 11, "faint")

    d.words(20, 300, "Stage 2: unified model", 15, bold=True)
    d.words(20, 320, "one sequence of text and pictures, read and written", 12, "faint")
    kinds = [*["text"] * 4, "plain", *["both"] * 7, "plain", *["text"] * 4]
    x0, step = 130, 42
    marks = {4: "<image>", 12: "</image>"}
    for place, kind in enumerate(kinds):
        x = x0 + step * place
        if kind == "both":
            for y, half in ((500, "pixel"), (516, "semantic")):
                d.parts.append(
                    f'<rect x="{x}" y="{y}" width="34" height="14" rx="2" fill="{colours[half]}" '
                    f'stroke="{colours["line"]}"/>'
                )
        else:
            d.box(x, 500, 34, 30, "", kind)
        if place in marks:
            d.words(x + 17, 548, marks[place], 10, "faint", anchor="middle")
        d.arrow((x + 17, 498), (x + 17, 482))
    d.words(x0 + 2 * step - 4, 548, "text", 11, "faint", anchor="middle")
    d.words(x0 + 8.4 * step, 548, "positions of a picture: D pixel + D semantic codes", 11, "faint", "middle")
    d.words(20, 520, "in", 12, "faint")
    d.box(x0, 452, step * 17 - 8, 30, "embedding: text by table, codes by their vectors and an MLP")
    d.arrow((487, 452), (487, 438))
    d.box(
        x0,
        402,
        step * 17 - 8,
        36,
        "decoder-only language model (Qwen2.5), packed documents do not see each other",
    )
    for x, words, kind in (
        (160, "text head", "text"),
        (390, "pixel head\ndepth transformer", "pixel"),
        (620, "semantic head\ndepth transformer", "semantic"),
    ):
        d.arrow((x + 90, 402), (x + 90, 388))
        d.box(x, 344, 180, 44, words, kind)
    d.words(20, 370, "out", 12, "faint")
    d.words(812, 362, "next token, or all", 11, "faint")
    d.words(812, 378, "codes of a position", 11, "faint")
    return d.svg("A visual tokenizer with two codebooks and a language model that reads and writes its codes")


def tokenizer_step(colours: dict[str, str]) -> str:
    """Who gives gradients to whom in a step of stage 1."""
    d = Drawing(960, 330, colours)
    d.words(20, 28, "A step of the visual tokenizer", 15, bold=True)
    d.words(290, 28, "solid: values, forward; dashed: gradients, backward", 12, "faint")
    d.box(20, 120, 80, 50, "pictures")
    d.arrow((100, 145), (135, 145))
    d.box(135, 110, 170, 70, "generator engine\ntower, projections,\ndecoder", "plain")
    d.arrow((305, 145), (400, 145), label="forward")
    d.box(400, 115, 120, 60, "reconstruction\na leaf of its own")
    d.arrow((520, 128), (600, 72), (640, 72))
    d.arrow((520, 140), (640, 140))
    d.arrow((520, 158), (600, 212), (640, 212))
    d.box(640, 50, 150, 44, "MSE")
    d.box(640, 118, 150, 44, "LPIPS\nfrozen", "frozen")
    d.box(640, 190, 150, 44, "discriminator\nits weights held still", "frozen")
    d.arrow((790, 72), (812, 72), (812, 122), (830, 122), dashed=True)
    d.arrow((790, 140), (830, 140), dashed=True)
    d.arrow((790, 212), (812, 212), (812, 158), (830, 158), dashed=True)
    d.box(830, 110, 110, 60, "gradient at\nthe picture", "pixel")
    d.words(640, 256, "MSE + LPIPS gives a, GAN gives b; GAN's weight is", 11, "faint")
    d.words(640, 272, "|a| / |b|, both taken on to the decoder's last layer", 11, "faint")
    d.arrow((885, 110), (885, 40), (460, 40), (460, 62), dashed=True)
    d.box(385, 62, 150, 34, "<gradient, picture>", "pixel")
    d.arrow((385, 79), (220, 79), (220, 110), dashed=True)
    d.words(300, 71, "one backward", 11, "faint", anchor="middle")
    d.box(135, 225, 170, 44, "commitment,\ndistillation", "semantic")
    d.arrow((205, 180), (205, 225))
    d.arrow((245, 225), (245, 180), dashed=True)
    d.box(400, 250, 150, 44, "discriminator engine\nreal against drawn", "plain")
    d.arrow((445, 175), (445, 250))
    d.words(452, 216, "detached", 11, "faint")
    d.arrow((550, 265), (580, 265), (580, 285), (552, 285), dashed=True)
    d.words(400, 312, "its own loss, its own optimizer", 11, "faint")
    return d.svg("Who gives gradients to whom in a step of the visual tokenizer")


FIGURES = {"architecture": architecture, "tokenizer_step": tokenizer_step}


def draw(folder: Path) -> list[Path]:
    """Write every figure for every theme; returns the files."""
    written = []
    for name, figure in FIGURES.items():
        for theme, colours in THEMES.items():
            path = folder / f"{name}-{theme}.svg"
            path.write_text(figure(colours), encoding="utf-8")
            written.append(path)
    return written


if __name__ == "__main__":
    for file in draw(Path(__file__).parent):
        sys.stdout.write(f"{file}\n")
