"""What local benchmarks show: held-out drawings and lettering, one alone or a few on a canvas."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.shards.image_text_shards import expand_inputs, read_sample, read_shard
from data_pipeline.sources.openmoji import Picture, drawings_folder, neutral_first, render

# What OpenMoji draws in letters, which the sample data leave out. Not the A: scorers drop articles, so that
# nothing at all would be a right answer.
WORDS = {
    **{"1F171": "B", "1F17E": "O", "1F17F": "P", "1F18E": "AB", "1F191": "CL", "1F192": "COOL"},
    **{"1F193": "FREE", "1F194": "ID", "1F195": "NEW", "1F196": "NG", "1F197": "OK", "1F198": "SOS"},
    **{"1F19A": "VS", "1F519": "BACK", "1F51A": "END", "1F51C": "SOON", "1F51D": "TOP", "2122": "TM"},
}
DIGITS = {f"003{digit}-FE0F-20E3": str(digit) for digit in range(10)}
JAPANESE = {
    **{"1F201": "here", "1F202": "service charge", "1F21A": "free of charge", "1F22F": "reserved"},
    **{"1F232": "prohibited", "1F233": "vacancy", "1F234": "passing grade", "1F235": "no vacancy"},
    **{"1F236": "not free of charge", "1F237": "monthly amount", "1F238": "application"},
    **{"1F239": "discount", "1F23A": "open for business", "1F250": "bargain", "1F251": "acceptable"},
    **{"3297": "congratulations", "3299": "secret"},
}
PLUS = "2795"

# OpenMoji's palette, without what people would not all call the same; white things are shaded grey.
PALETTE = {
    "red": ("ea5a47", "d22f27"),
    "yellow": ("fcea2b",),
    "green": ("b1cc33", "5c9e31", "186648"),
    "blue": ("92d3f5", "61b2e4", "1e50a0"),
    "purple": ("b399c8", "8967aa"),
    "pink": ("ffa7c0", "e67a94"),
    "brown": ("a57939", "6a462f"),
}
_NEAR = 24  # of 255, in each channel
_OUTLINE = 64  # darker pixels are outlines
_LEAST_INK, _MAIN_SHARE = 0.1, 0.7

_KINDS = {
    "animals": (range(0x1F400, 0x1F440), range(0x1F980, 0x1F9AF), (0x1FABF, 0x1FACD)),
    "food": (range(0x1F32D, 0x1F330), range(0x1F33D, 0x1F33E), range(0x1F344, 0x1F380))
    + (range(0x1F950, 0x1F970), range(0x1F9C0, 0x1F9CC)),
    "people": (range(0x1F466, 0x1F488), range(0x1F9D1, 0x1F9E0), range(0x1F600, 0x1F650))
    + (range(0x1F910, 0x1F918), range(0x1F920, 0x1F930), range(0x1F970, 0x1F97B)),
}


@dataclass(frozen=True, eq=False)
class Thing:
    """A drawing: its key, names by language (of lettering: what it says), pixels, what is known of it."""

    key: str
    names: Mapping[str, str]
    image: Image.Image
    concept: str = ""
    colour: str | None = None  # where one colour covers most of it

    @property
    def name(self) -> str:
        """The English name."""
        return self.names["en"]

    @property
    def kind(self) -> str | None:
        """`animals`, `food` or `people`, by its code point."""
        code = int(self.key.split("-")[0], 16)
        return next((kind for kind, parts in _KINDS.items() if any(code in part for part in parts)), None)

    def words(self) -> set[str]:
        """The words of all its names, to tell it from drawings whose names say a part of the same."""
        words = {word for name in self.names.values() for word in name.lower().split()}
        return {word for word in words if len(word) > 2} or words


@dataclass(frozen=True, eq=False)
class Scene:
    """One thing alone, or several in cells (row, column) of a canvas of 2 x 2."""

    things: Sequence[Thing]
    cells: Sequence[tuple[int, int]] = ()

    def image(self) -> Image.Image:
        """The picture, RGB; a canvas is twice as wide as a thing."""
        if not self.cells:
            return self.things[0].image
        side = self.things[0].image.width
        canvas = Image.new("RGB", (2 * side, 2 * side), "white")
        for thing, (row, column) in zip(self.things, self.cells, strict=True):
            canvas.paste(thing.image, (column * side, row * side))
        return canvas

    def encoded(self, form: str) -> bytes:
        """The picture as a file, `PNG` or `JPEG`."""
        out = io.BytesIO()
        self.image().save(out, form, **({"quality": 90} if form == "JPEG" else {}))
        return out.getvalue()


@dataclass(frozen=True)
class Drawings:
    """Everything that may be shown."""

    things: list[Thing]  # held out, one of each concept
    variants: list[Thing]  # held out, all
    words: list[Thing]
    digits: list[Thing]
    japanese: list[Thing]
    plus: Thing

    def others(self, present: Sequence[Thing], draw: random.Random) -> list[Thing]:
        """The things that share no word with those present, in an order by chance."""
        taken = set().union(*(thing.words() for thing in present))
        found = [thing for thing in self.things if not taken & thing.words()]
        draw.shuffle(found)
        return found


def main_colour(image: Image.Image) -> str | None:
    """The name of the colour that covers most of a drawing without its outline; None where there is none."""
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    ink = pixels[(pixels.min(1) < 255 - _NEAR) & (pixels.max(1) > _OUTLINE)]
    if len(ink) < _LEAST_INK * len(pixels):
        return None
    covered: Counter[str] = Counter()
    for name, colours in PALETTE.items():
        table = np.array([[int(colour[at : at + 2], 16) for at in (0, 2, 4)] for colour in colours])
        near = np.abs(ink[:, None] - table).max(2) < _NEAR  # [pixels, colours]
        covered[name] = int(near.any(1).sum())
    name, count = covered.most_common(1)[0]
    return name if count >= _MAIN_SHARE * len(ink) else None


def read_drawings(shards: Path, image_size: int) -> Drawings:
    """The held-out drawings of the sample data, and lettering at their size.

    Args:
        shards: folder of prepared image-text shards, of drawings with names.
        image_size: side of the drawings in pixels.

    Raises:
        ImportError: a package of the extra `sample` is missing.
        ValueError: a drawing has no English name.
    """
    variants = []
    for shard in expand_inputs([str(shards)]):
        for key, parts in read_shard(shard):
            sample = read_sample(key, parts)
            names = sample.captions or {}
            if "en" not in names:
                raise ValueError(f"{shard}, {key}: names in {sorted(names)}; questions need English ones")
            with Image.open(io.BytesIO(sample.images[0])) as image:
                pixels = image.convert("RGB")
            variants.append(Thing(key, names, pixels, _concept(parts), main_colour(pixels)))
    variants.sort(key=lambda thing: neutral_first(Picture(thing.key, {}, "")))
    concepts = {thing.concept: thing for thing in reversed(variants)}
    things = sorted(concepts.values(), key=lambda thing: thing.key)
    lettering = {
        key: _lettering(key, said, image_size) for key, said in {**WORDS, **DIGITS, **JAPANESE}.items()
    }
    return Drawings(
        things=things,
        variants=sorted(variants, key=lambda thing: thing.key),
        words=[lettering[key] for key in WORDS],
        digits=[lettering[key] for key in DIGITS],
        japanese=[lettering[key] for key in JAPANESE],
        plus=_lettering(PLUS, "+", image_size),
    )


def _concept(parts: Mapping[str, bytes]) -> str:
    return str(json.loads(parts["json"])["concept"])


def _lettering(key: str, said: str, size: int) -> Thing:
    png = render(drawings_folder() / f"{key}.svg", size)
    return Thing(key, {"en": said}, Image.open(io.BytesIO(png)).convert("RGB"))
