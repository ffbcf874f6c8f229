"""What local benchmarks show beside scenes: held-out drawings and lettering, alone or a few on a canvas."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, eq=False)
class Thing:
    """A drawing: its key, names by language (of lettering: what it says), pixels, its concept."""

    key: str
    names: Mapping[str, str]
    image: Image.Image
    concept: str = ""

    @property
    def name(self) -> str:
        """The English name."""
        return self.names["en"]

    def words(self) -> set[str]:
        """The words of all its names, to tell it from drawings whose names say a part of the same."""
        words = {word for name in self.names.values() for word in name.lower().split()}
        return {word for word in words if len(word) > 2} or words


@dataclass(frozen=True, eq=False)
class Canvas:
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
            variants.append(Thing(key, names, pixels, _concept(parts)))
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
