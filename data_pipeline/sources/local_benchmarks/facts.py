"""True statements about pictures: a question, its answer, and wrong answers of the same kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.sources.local_benchmarks.scenes import PALETTE, Drawings, Scene, Thing

CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
SIDES = {"left": (0, -1), "right": (0, 1), "upper": (-1, 0), "lower": (1, 0)}  # rows, columns
MOST = len(CORNERS)
WRONG = 3


@dataclass(frozen=True, eq=False)
class Fact:
    """Something true of a picture, to be asked in any form."""

    kind: str
    scene: Scene
    question: str
    claim: str  # a question of yes or no, with {} for an answer
    answer: str
    wrong: tuple[str, ...]  # three

    def claimed(self, answer: str) -> str:
        """Whether the answer is this one, as a question."""
        return self.claim.format(answer)

    def options(self, draw: random.Random) -> tuple[list[str], int]:
        """All answers in an order by chance, and the place of the true one."""
        options = [self.answer, *self.wrong]
        draw.shuffle(options)
        return options, options.index(self.answer)


def _name(thing: Thing, drawings: Drawings, draw: random.Random) -> Fact:
    return Fact(
        "name",
        Scene([thing]),
        "What is drawn in the image?",
        'Is there a drawing of "{}" in the image?',
        thing.name,
        _names(drawings.others([thing], draw)),
    )


def _colour(thing: Thing, drawings: Drawings, draw: random.Random) -> Fact | None:
    if thing.colour is None:
        return None
    return Fact(
        "colour",
        Scene([thing]),
        "What is the main color of the drawing?",
        "Is {} the main color of the drawing?",
        thing.colour,
        tuple(draw.sample([name for name in PALETTE if name != thing.colour], WRONG)),
    )


def _count(thing: Thing, drawings: Drawings, draw: random.Random) -> Fact:
    count = draw.randint(1, MOST)
    return Fact(
        "count",
        Scene([thing] * count, draw.sample(list(CORNERS.values()), count)),
        f'How many drawings of "{thing.name}" are in the image?',
        f'Is the number of drawings of "{thing.name}" in the image {{}}?',
        str(count),
        tuple(str(number) for number in range(1, MOST + 1) if number != count),
    )


def _corner(thing: Thing, drawings: Drawings, draw: random.Random) -> Fact:
    beside = drawings.others([thing], draw)[: draw.randint(1, MOST - 1)]
    corners = draw.sample(list(CORNERS), 1 + len(beside))
    return Fact(
        "corner",
        Scene([thing, *beside], [CORNERS[name] for name in corners]),
        f'In which corner of the image is the drawing of "{thing.name}"?',
        f'Is the drawing of "{thing.name}" in the {{}} corner of the image?',
        corners[0],
        tuple(name for name in CORNERS if name != corners[0]),
    )


def _side(thing: Thing, drawings: Drawings, draw: random.Random) -> Fact | None:
    others = drawings.others([thing], draw)
    if not others:
        return None
    side, line = draw.choice(list(SIDES)), draw.randint(0, 1)
    cells = ((0, line), (1, line)) if side in ("upper", "lower") else ((line, 0), (line, 1))
    first, second = cells if sum(SIDES[side]) < 0 else cells[::-1]
    return Fact(
        "side",
        Scene([thing, others[0]], [first, second]),
        f'On which side of the drawing of "{others[0].name}" is the drawing of "{thing.name}"?',
        f'Is the drawing of "{thing.name}" on the {{}} side of the drawing of "{others[0].name}"?',
        side,
        tuple(name for name in SIDES if name != side),
    )


def _labelled(thing: Thing, drawings: Drawings, draw: random.Random) -> Fact | None:
    """Two drawings, each with a digit to the right of it."""
    others = drawings.others([thing], draw)
    if not others:
        return None
    digits = draw.sample(drawings.digits, 1 + WRONG)
    rows = draw.sample((0, 1), 2)
    return Fact(
        "label",
        Scene(
            [thing, digits[0], others[0], digits[1]],
            [(row, column) for row in rows for column in (0, 1)],
        ),
        f'Which number stands to the right of the drawing of "{thing.name}"?',
        f'Is {{}} the number to the right of the drawing of "{thing.name}"?',
        digits[0].name,
        tuple(digit.name for digit in digits[1:]),
    )


def _text(word: Thing, drawings: Drawings, draw: random.Random) -> Fact:
    others = [other.name for other in drawings.words if other.name != word.name]
    return Fact(
        "text",
        Scene([word]),
        "What is written in the image?",
        'Is the text in the image "{}"?',
        word.name,
        tuple(draw.sample(others, WRONG)),
    )


def _text_beside(word: Thing, drawings: Drawings, draw: random.Random) -> Fact:
    """Two words one above the other."""
    others = draw.sample([other for other in drawings.words if other.name != word.name], WRONG)
    place, row = draw.choice([("top", 0), ("bottom", 1)])
    column = draw.randint(0, 1)
    return Fact(
        "text beside",
        Scene([word, others[0]], [(row, column), (1 - row, column)]),
        f"What is written at the {place} of the image?",
        f'Is the text at the {place} of the image "{{}}"?',
        word.name,
        tuple(other.name for other in others),
    )


def _sum(digit: Thing, drawings: Drawings, draw: random.Random) -> Fact:
    other = draw.choice(drawings.digits)
    total = int(digit.name) + int(other.name)
    near = [total + step for step in (-3, -2, -1, 1, 2, 3) if total + step >= 0]
    return Fact(
        "sum",
        Scene([digit, drawings.plus, other], [(0, 0), (0, 1), (1, 0)]),
        "What is the result of the sum in the image?",
        "Is the result of the sum in the image {}?",
        str(total),
        tuple(map(str, draw.sample(near, WRONG))),
    )


def _meaning(sign: Thing, drawings: Drawings, draw: random.Random) -> Fact:
    others = [other.name for other in drawings.japanese if other is not sign]
    return Fact(
        "meaning",
        Scene([sign]),
        "What does the Japanese in the image mean in English?",
        'Is it appropriate to translate the Japanese in the image into English "{}"?',
        sign.name,
        tuple(draw.sample(others, WRONG)),
    )


def _names(things: list[Thing]) -> tuple[str, ...]:
    return tuple(thing.name for thing in things[:WRONG])


_MAKERS: dict[str, tuple[Callable[[Thing, Drawings, random.Random], Fact | None], str]] = {
    "name": (_name, "things"),
    "colour": (_colour, "things"),
    "count": (_count, "things"),
    "corner": (_corner, "things"),
    "side": (_side, "things"),
    "label": (_labelled, "things"),
    "text": (_text, "words"),
    "text beside": (_text_beside, "words"),
    "sum": (_sum, "digits"),
    "meaning": (_meaning, "japanese"),
}


def draw_facts(kind: str, drawings: Drawings, draw: random.Random, count: int) -> list[Fact]:
    """Up to `count` facts of a kind, each about another drawing, sign or digit."""
    make, pool = _MAKERS[kind]
    things = list(getattr(drawings, pool))
    draw.shuffle(things)
    made = (make(thing, drawings, draw) for thing in things)
    return [fact for fact in made if fact is not None and len(fact.wrong) == WRONG][:count]
