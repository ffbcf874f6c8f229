"""Questions about a scene, with their answers, as LLaVA's training data and benchmarks put them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.sources.scenes.captions import plural
from data_pipeline.sources.scenes.parts import (
    COLOURS,
    NUMBERS,
    PLACES,
    SIDES,
    THINGS,
    Combination,
    Scene,
    pair_of,
)

IN_A_WORD = "\nAnswer the question using a single word or phrase."
BY_LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCD"
KINDS = ("what", "colour", "count", "where")
ASKED = (*KINDS, "yesno", "choice")
_WRONG = 3
_NUMBER_WORDS = {str(number): word for word, number in NUMBERS.items()}
HeldOut = frozenset[Combination]
NOTHING: HeldOut = frozenset()


@dataclass(frozen=True)
class Fact:
    """Something true of a scene, to be asked in any form."""

    kind: str  # of `KINDS`
    question: str
    claim: str  # a question of yes or no, with {} for an answer
    answer: str
    others: tuple[str, ...]  # other answers that could be given, none of them true

    def claimed(self, answer: str) -> str:
        """Whether the answer is this one, as a question."""
        if self.kind == "what":
            return self.claim.format(with_article(answer))
        return self.claim.format(answer)

    def options(self, draw: random.Random) -> tuple[list[str], int]:
        """Four answers in an order by chance, and the place of the true one."""
        options = [self.answer, *draw.sample(self.others, _WRONG)]
        draw.shuffle(options)
        return options, options.index(self.answer)


def with_article(thing: str) -> str:
    """`a car`, `an umbrella`."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def what(scene: Scene, held_out: HeldOut) -> list[Fact]:
    """What is there; of two things, what is at each side."""
    absent = absent_things(scene, held_out)
    if not scene.is_pair:
        name = scene.items[0].thing
        return [Fact("what", "What is in the image?", "Is there {} in the image?", name, absent)]
    things = {item.thing for item in scene.items}
    return [
        Fact(
            "what",
            f"What is {_at(side)}?",
            f"Is there {{}} {_at(side)}?",
            item.thing,
            (*absent, *(things - {item.thing})),
        )
        for side, item in zip(SIDES[scene.layout], scene.items, strict=True)
    ]


def colour(scene: Scene, held_out: HeldOut) -> list[Fact]:
    """In which colour each thing is."""
    facts = []
    for item in scene.items:
        verb, name = ("are", plural("en", item.thing)) if scene.number > 1 else ("is", item.thing)
        others = tuple(
            other
            for other in COLOURS
            if other != item.colour and Combination("colour", item.thing, other) not in held_out
        )
        question = f"What color {verb} the {name}?"
        facts.append(Fact("colour", question, f"{verb.title()} the {name} {{}}?", item.colour, others))
    return facts


def count(scene: Scene, held_out: HeldOut) -> list[Fact]:
    """How many there are."""
    facts = []
    for item in scene.items:
        name = plural("en", item.thing)
        answer = str(scene.number)
        others = tuple(
            number
            for number in ("1", *_NUMBER_WORDS)
            if number != answer
            and Combination("number", item.thing, _NUMBER_WORDS.get(number, "")) not in held_out
        )
        question, claim = f"How many {name} are in the image?", f"Is the number of {name} in the image {{}}?"
        facts.append(Fact("count", question, claim, answer, others))
    return facts


def where(scene: Scene, held_out: HeldOut) -> list[Fact]:
    """Where a thing is, none of several of one thing."""
    if scene.is_pair:
        every = tuple(side for sides in SIDES.values() for side in sides)
        at = list(zip(scene.items, SIDES[scene.layout], strict=True))
    elif scene.number == 1:
        every = tuple(PLACES)
        at = [(scene.items[0], scene.layout)]
    else:
        return []
    return [
        Fact(
            "where",
            f"Where is the {item.thing}?",
            f"Is the {item.thing} {{}}?",
            side,
            tuple(other for other in every if other != side),
        )
        for item, side in at
    ]


_FACTS: dict[str, Callable[[Scene, HeldOut], list[Fact]]] = {
    "what": what,
    "colour": colour,
    "count": count,
    "where": where,
}


def facts(scene: Scene, kinds: Iterable[str] = KINDS, held_out: HeldOut = NOTHING) -> list[Fact]:
    """Everything that can be asked about a scene; no wrong answer makes it a held-out combination."""
    return [fact for kind in kinds for fact in _FACTS[kind](scene, held_out)]


def is_there(thing: str) -> str:
    """POPE's question."""
    return f"Is there {with_article(thing)} in the image?"


class AbsentThings:
    """Things that a picture does not show, chosen as in POPE (arXiv 2305.10355, section 5.1).

    Args:
        trained: scenes of the training set.
    """

    CATEGORIES = ("random", "popular", "adversarial")

    def __init__(self, trained: Iterable[Scene]) -> None:
        self.often: Counter[str] = Counter()
        self.together: Counter[tuple[str, str]] = Counter()
        for scene in trained:
            things = [item.thing for item in scene.items]
            self.often.update(things)
            self.together.update(itertools.permutations(things, 2))

    def draw(self, scene: Scene, category: str, draw: random.Random) -> str:
        """Draw a thing that is not there: any, one of the three most frequent, or of the commonest partners.

        Raises:
            KeyError: the category is unknown.
        """
        absent = list(absent_things(scene))
        draw.shuffle(absent)
        there = [item.thing for item in scene.items]
        rank = {
            "random": lambda name: 0,
            "popular": lambda name: -self.often[name],
            "adversarial": lambda name: -sum(self.together[name, other] for other in there),
        }[category]
        return draw.choice(sorted(absent, key=rank)[:3]) if category != "random" else absent[0]


def lettered(question: str, options: Sequence[str]) -> str:
    """A question with its options, as LLaVA asks SEED-Bench and MMBench."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([question, *lines])


def ask(scene: Scene, kind: str, draw: random.Random, held_out: HeldOut = NOTHING) -> tuple[str, str] | None:
    """A question of a kind of `ASKED` and its answer, drawn; None where a scene has none of it.

    Questions of yes or no are answered yes as often as no: half about whether a thing is there, half about
    the rest. Neither they nor options name a held-out combination.
    """
    kinds = KINDS if kind in ("yesno", "choice") else (kind,)
    found = facts(scene, kinds, held_out)
    if kind == "yesno":
        true = draw.random() < 0.5
        if draw.random() < 0.5:
            there = [item.thing for item in scene.items]
            thing = draw.choice(there if true else absent_things(scene, held_out))
            return is_there(thing), "yes" if true else "no"
        fact = draw.choice(found)
        return fact.claimed(fact.answer if true else draw.choice(fact.others)), "yes" if true else "no"
    if kind == "choice":
        fact = draw.choice([fact for fact in found if len(fact.others) >= _WRONG])
        options, place = fact.options(draw)
        return f"{lettered(fact.question, options)}{BY_LETTER}", LETTERS[place]
    if not found:
        return None
    fact = draw.choice(found)
    return fact.question, fact.answer


def conversation(
    scene: Scene, draw: random.Random, kinds: Sequence[str], held_out: HeldOut = NOTHING
) -> list[dict[str, Any]]:
    """Questions of these kinds in an order by chance as a LLaVA conversation about one image.

    As in LLaVA-1.5's training data, the first turn says in which form answers are wanted.
    """
    asked = list(
        {found: kind for kind in kinds if (found := ask(scene, kind, draw, held_out)) is not None}.items()
    )
    draw.shuffle(asked)
    turns: list[dict[str, Any]] = []
    for (question, answer), kind in asked:
        if not turns:
            form = "" if kind == "choice" else IN_A_WORD
            question = f"<image>\n{question}{form}"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def absent_things(scene: Scene, held_out: HeldOut = NOTHING) -> tuple[str, ...]:
    """Things that are not there, without the held-out partners of those that are."""
    there = [item.thing for item in scene.items]
    return tuple(
        name
        for name in THINGS
        if name not in there and not any(pair_of(name, other) in held_out for other in there)
    )


def _at(side: str) -> str:
    return f"at the {side}" if side in ("top", "bottom") else f"on the {side}"
