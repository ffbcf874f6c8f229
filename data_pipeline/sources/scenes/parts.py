"""What scenes are made of: things, colours, backgrounds, layouts, and the combinations of them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Thing:
    """A drawing of OpenMoji that can be coloured."""

    key: str  # OpenMoji's file stem
    main: str  # the colours in it that take the light and the dark shade of another
    dark: str = ""
    drawn: tuple[str, ...] = ()  # colours in which OpenMoji itself draws it, or something that looks alike
    drawn_several: bool = False  # OpenMoji has a drawing of several of it


@dataclass(frozen=True)
class Colour:
    """OpenMoji's light and dark shade of a colour."""

    main: str
    dark: str


_ALL = ("red", "yellow", "green", "blue", "purple")
THINGS: Mapping[str, Thing] = MappingProxyType(
    {
        "car": Thing("1F697", "ea5a47", drawn=("red", "blue", "yellow")),
        "balloon": Thing("1F388", "ea5a47", "d22f27", drawn=("red",)),
        "fish": Thing("1F41F", "92d3f5", "61b2e4", drawn=("red", "blue", "yellow"), drawn_several=True),
        "umbrella": Thing("2602", "b399c8", "8967aa", drawn=("purple",)),
        "book": Thing("1F4D5", "d22f27", drawn=("red", "green", "blue", "yellow"), drawn_several=True),
        "shirt": Thing("1F455", "61b2e4", "92d3f5", drawn=("blue", "purple")),
        "frog": Thing("1F438", "b1cc33", drawn=("green",)),
        "bell": Thing("1F514", "fcea2b", "f1b31c", drawn=("yellow",)),
        "star": Thing("2B50", "fcea2b", drawn=("yellow", "purple"), drawn_several=True),
        "heart": Thing("2764", "d22f27", drawn=_ALL, drawn_several=True),
        "circle": Thing("1F534", "d22f27", drawn=_ALL),
        "triangle": Thing("1F53A", "d22f27", drawn=("red", "yellow")),
    }
)
COLOURS: Mapping[str, Colour] = MappingProxyType(
    {
        "red": Colour("#ea5a47", "#d22f27"),
        "yellow": Colour("#fcea2b", "#f1b31c"),
        "green": Colour("#b1cc33", "#5c9e31"),
        "blue": Colour("#61b2e4", "#1e50a0"),
        "purple": Colour("#b399c8", "#8967aa"),
    }
)


@dataclass(frozen=True)
class Background:
    """Paper with a pattern on it, eight times across a picture."""

    ground: tuple[int, int, int]
    ink: tuple[int, int, int]
    pattern: str  # `dots`, `checks` or `stripes`


# Not plain: what a shallow layer says of a patch with nothing in it is about the patches around it, and the
# codes of that are as good as random.
BACKGROUNDS: Mapping[str, Background] = MappingProxyType(
    {
        "white": Background((255, 255, 255), (188, 208, 224), "dots"),
        "grey": Background((222, 222, 220), (190, 189, 188), "checks"),
        "pink": Background((255, 224, 233), (248, 187, 208), "stripes"),
    }
)

# Where things stand: the upper left corners of their cells, (right, down), in quarters of the picture's side.
PLACES = MappingProxyType(
    {"top left": (0, 0), "top right": (2, 0), "bottom left": (0, 2), "bottom right": (2, 2), "middle": (1, 1)}
)
LAYOUTS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        **{place: (cell,) for place, cell in PLACES.items()},
        "two": ((0, 1), (2, 1)),
        "three": ((0, 0), (2, 0), (1, 2)),
        "four": ((0, 0), (2, 0), (0, 2), (2, 2)),
        "side by side": ((0, 1), (2, 1)),
        "one above the other": ((1, 0), (1, 2)),
    }
)
NUMBERS = MappingProxyType({"two": 2, "three": 3, "four": 4})
SIDES = MappingProxyType({"side by side": ("left", "right"), "one above the other": ("top", "bottom")})
KINDS = ("colour", "number", "pair")


@dataclass(frozen=True, order=True)
class Item:
    """A thing in a colour."""

    thing: str
    colour: str


@dataclass(frozen=True, order=True)
class Scene:
    """One thing at a place, several of one thing, or two things side by side or one above the other.

    Raises:
        ValueError: a layout that does not exist, or as many items as it has no use for.
    """

    layout: str
    items: tuple[Item, ...]  # one; of a pair two, the left or upper one first
    background: str = "white"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, expected one of {', '.join(LAYOUTS)}")
        if len(self.items) != 1 + self.is_pair:
            raise ValueError(f"{len(self.items)} items {self.layout}, expected {1 + self.is_pair}")

    @property
    def is_pair(self) -> bool:
        """Whether it shows two different things."""
        return self.layout in SIDES

    @property
    def shape(self) -> str:
        """`single`, `several` of one thing, or a `pair` of two."""
        if self.is_pair:
            return "pair"
        return "several" if self.layout in NUMBERS else "single"

    @property
    def number(self) -> int:
        """How many of each thing it shows."""
        return NUMBERS.get(self.layout, 1)

    def placed(self) -> list[tuple[Item, tuple[int, int]]]:
        """Each drawing with its cell."""
        cells = LAYOUTS[self.layout]
        return list(zip(self.items * (len(cells) // len(self.items)), cells, strict=True))

    def combinations(self) -> list[Combination]:
        """What is combined in it: things with colours, things with numbers above one, things with things."""
        found = [Combination("colour", item.thing, item.colour) for item in self.items]
        if self.number > 1:
            found.append(Combination("number", self.items[0].thing, self.layout))
        if self.is_pair:
            found.append(pair_of(*(item.thing for item in self.items)))
        return found


@dataclass(frozen=True, order=True)
class Combination:
    """Two parts that may be held out together: of a `colour`, a `number`, or a `pair` of things by name."""

    kind: str
    thing: str
    other: str

    def __str__(self) -> str:
        if self.kind == "pair":
            return f"{self.thing} with {self.other}"
        return f"{self.other} {self.thing}"


def pair_of(thing: str, other: str) -> Combination:
    """Two things together, in whatever order."""
    return Combination("pair", *sorted((thing, other)))


# The Spanish name of the blowfish, `pez globo`, is these two words.
_NAMED_TOGETHER = frozenset({pair_of("balloon", "fish")})


def all_combinations() -> list[Combination]:
    """Every combination that may be held out, by kind.

    Left out is what OpenMoji itself draws (its purple heart, its books) or names (`pez globo`): drawings are
    trained on too.
    """
    coloured = [
        Combination("colour", name, colour)
        for name, thing in THINGS.items()
        for colour in COLOURS
        if colour not in thing.drawn
    ]
    numbered = [
        Combination("number", name, number)
        for name, thing in THINGS.items()
        for number in NUMBERS
        if not thing.drawn_several
    ]
    pairs = [pair_of(*pair) for pair in itertools.combinations(THINGS, 2)]
    return [*coloured, *numbered, *(pair for pair in pairs if pair not in _NAMED_TOGETHER)]


def hold_out(share: float, seed: int) -> frozenset[Combination]:
    """Choose combinations by a seeded hash of their names, so that every part stays well seen.

    Of each kind the share `share` of all is held out, rounded up, or as many as these limits leave (fewer
    from about 0.12): one colour, one number and two partners a thing, two things a colour or number.

    Raises:
        ValueError: `share` outside (0, 1/4].
    """
    if not 0 < share <= 0.25:
        raise ValueError(f"held_out is {share}, expected a share above 0 and at most 0.25, for example 0.1")
    counts = {
        "colour": len(THINGS) * len(COLOURS),
        "number": len(THINGS) * len(NUMBERS),
        "pair": len(THINGS) * (len(THINGS) - 1) // 2,
    }
    most = {"colour": (1, 2), "number": (1, 2), "pair": (2, 2)}
    chosen: set[Combination] = set()
    candidates = sorted(all_combinations(), key=lambda one: _digest(seed, str(one)))
    for kind in KINDS:
        wanted = math.ceil(share * counts[kind])
        first: Counter[str] = Counter()
        second: Counter[str] = Counter()
        taken = 0
        for one in candidates:
            if one.kind != kind or taken == wanted:
                continue
            times = (first, first) if kind == "pair" else (first, second)
            if times[0][one.thing] < most[kind][0] and times[1][one.other] < most[kind][1]:
                times[0][one.thing] += 1
                times[1][one.other] += 1
                chosen.add(one)
                taken += 1
    return frozenset(chosen)


def all_scenes() -> Iterable[Scene]:
    """Every scene there is."""
    items = [Item(thing, colour) for thing in THINGS for colour in COLOURS]
    for layout in LAYOUTS:
        shown = (
            [(one, other) for one in items for other in items if one.thing != other.thing]
            if layout in SIDES
            else [(item,) for item in items]
        )
        for background in BACKGROUNDS:
            for chosen in shown:
                yield Scene(layout, chosen, background)


def _digest(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()
