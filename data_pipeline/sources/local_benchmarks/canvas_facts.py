"""What is true of canvases and cannot be said of scenes: labels, words, sums, meanings."""

from __future__ import annotations

import random
from collections.abc import Callable

from data_pipeline.sources.local_benchmarks.canvas import Canvas, Drawings, Thing
from data_pipeline.sources.local_benchmarks.files import Shown
from data_pipeline.sources.scenes.questions import Fact

WRONG = 3


def _labelled(thing: Thing, drawings: Drawings, draw: random.Random) -> Shown | None:
    """Two drawings, each with a digit to the right of it."""
    others = drawings.others([thing], draw)
    if not others:
        return None
    digits = draw.sample(drawings.digits, 1 + WRONG)
    rows = draw.sample((0, 1), 2)
    canvas = Canvas(
        [thing, digits[0], others[0], digits[1]], [(row, column) for row in rows for column in (0, 1)]
    )
    fact = Fact(
        "label",
        f'Which number stands to the right of the drawing of "{thing.name}"?',
        f'Is {{}} the number to the right of the drawing of "{thing.name}"?',
        digits[0].name,
        tuple(digit.name for digit in digits[1:]),
    )
    return Shown(fact, canvas.image())


def _text(word: Thing, drawings: Drawings, draw: random.Random) -> Shown:
    others = [other.name for other in drawings.words if other.name != word.name]
    fact = Fact(
        "text",
        "What is written in the image?",
        'Is the text in the image "{}"?',
        word.name,
        tuple(draw.sample(others, WRONG)),
    )
    return Shown(fact, Canvas([word]).image())


def _text_beside(word: Thing, drawings: Drawings, draw: random.Random) -> Shown:
    """Two words one above the other."""
    others = draw.sample([other for other in drawings.words if other.name != word.name], WRONG)
    place, row = draw.choice([("top", 0), ("bottom", 1)])
    column = draw.randint(0, 1)
    fact = Fact(
        "text beside",
        f"What is written at the {place} of the image?",
        f'Is the text at the {place} of the image "{{}}"?',
        word.name,
        tuple(other.name for other in others),
    )
    return Shown(fact, Canvas([word, others[0]], [(row, column), (1 - row, column)]).image())


def _sum(digit: Thing, drawings: Drawings, draw: random.Random) -> Shown:
    other = draw.choice(drawings.digits)
    total = int(digit.name) + int(other.name)
    near = [total + step for step in (-3, -2, -1, 1, 2, 3) if total + step >= 0]
    fact = Fact(
        "sum",
        "What is the result of the sum in the image?",
        "Is the result of the sum in the image {}?",
        str(total),
        tuple(map(str, draw.sample(near, WRONG))),
    )
    return Shown(fact, Canvas([digit, drawings.plus, other], [(0, 0), (0, 1), (1, 0)]).image())


def _meaning(sign: Thing, drawings: Drawings, draw: random.Random) -> Shown:
    others = [other.name for other in drawings.japanese if other is not sign]
    fact = Fact(
        "meaning",
        "What does the Japanese in the image mean in English?",
        'Is it appropriate to translate the Japanese in the image into English "{}"?',
        sign.name,
        tuple(draw.sample(others, WRONG)),
    )
    return Shown(fact, Canvas([sign]).image())


_MAKERS: dict[str, tuple[Callable[[Thing, Drawings, random.Random], Shown | None], str]] = {
    "label": (_labelled, "things"),
    "text": (_text, "words"),
    "text beside": (_text_beside, "words"),
    "sum": (_sum, "digits"),
    "meaning": (_meaning, "japanese"),
}
CANVAS_KINDS = tuple(_MAKERS)


def canvas_facts(kind: str, drawings: Drawings, draw: random.Random, count: int) -> list[Shown]:
    """Up to `count` facts of a kind of `CANVAS_KINDS`, each about another drawing, sign or digit."""
    make, pool = _MAKERS[kind]
    things = list(getattr(drawings, pool))
    draw.shuffle(things)
    made = (make(thing, drawings, draw) for thing in things)
    return [shown for shown in made if shown is not None][:count]
