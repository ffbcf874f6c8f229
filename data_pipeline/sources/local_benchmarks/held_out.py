"""Held-out scenes: which ones a benchmark shows, and what it asks about them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import TypeVar

from data_pipeline.sources.scenes.parts import Combination, Scene, all_scenes
from data_pipeline.sources.scenes.questions import AbsentThings, Fact, colour, count, what, where

SHAPES = ("single", "several", "pair")
# Kind of question -> (kind of combination, shape) of the scenes that are asked so.
_ABOUT: dict[str, Sequence[tuple[str, str]]] = {
    "what": (("pair", "pair"), ("number", "several"), ("colour", "single")),
    "colour": tuple(("colour", shape) for shape in SHAPES),
    "count": (("number", "several"), ("colour", "single"), ("colour", "several"), ("pair", "pair")),
    "place": (("colour", "single"),),
    "side": (("pair", "pair"),),
    "where": (("colour", "single"), ("pair", "pair")),
}
SCENE_KINDS = tuple(_ABOUT)
_ENOUGH = 12  # scenes for each one wanted, so that every answer is among them
_Any = TypeVar("_Any")


@dataclass(frozen=True)
class HeldOutScenes:
    """What no training scene combines, and the training scenes, which say what is frequent."""

    combinations: frozenset[Combination]
    trained: Sequence[Scene]
    languages: Sequence[str]  # of captions

    @cached_property
    def _by_combination(self) -> dict[Combination, dict[str, list[Scene]]]:
        """The scenes of exactly one held-out combination, by it and by shape."""
        found: dict[Combination, dict[str, list[Scene]]] = {
            one: {shape: [] for shape in SHAPES} for one in sorted(self.combinations)
        }
        for scene in all_scenes():
            if len(shown := self.combinations.intersection(scene.combinations())) == 1:
                found[next(iter(shown))][scene.shape].append(scene)
        return found

    def scenes(self, kind: str, shape: str, draw: random.Random, most: int) -> list[Scene]:
        """Up to `most` different scenes of a kind of combination and a shape, each combination as often."""
        lists = []
        for one, shapes in self._by_combination.items():
            if one.kind == kind:
                lists.append(draw.sample(shapes[shape], min(most, len(shapes[shape]))))
        draw.shuffle(lists)
        return in_turns(lists)[:most]

    def facts(self, kind: str, draw: random.Random, most: int) -> list[tuple[Scene, Fact]]:
        """Up to `most` facts of a kind of `SCENE_KINDS`, each about another scene, each answer as often.

        They are about what is held out: of colours the thing in a colour it is never trained in is asked of.
        Wrong answers may be held out as well, so that neither a yes nor a no is told by its rarity.
        """
        sources = [self.scenes(*about, draw, _ENOUGH * most) for about in _ABOUT[kind]]
        by_answer: dict[str, list[tuple[Scene, Fact]]] = {}
        for scene in in_turns(sources):
            fact = draw.choice(self._facts_of(kind, scene))
            by_answer.setdefault(fact.answer, []).append((scene, fact))
        lists = list(by_answer.values())
        draw.shuffle(lists)
        return in_turns(lists)[:most]

    def _facts_of(self, kind: str, scene: Scene) -> list[Fact]:
        nothing: frozenset[Combination] = frozenset()
        if kind == "colour":
            facts = zip(scene.items, colour(scene, nothing), strict=True)
            return [
                fact
                for item, fact in facts
                if Combination("colour", item.thing, item.colour) in self.combinations
            ]
        ask = {"what": what, "count": count}.get(kind, where)
        return ask(scene, nothing)

    @cached_property
    def absent(self) -> AbsentThings:
        """How often things, and pairs of them, are in the training scenes."""
        return AbsentThings(self.trained)


def in_turns(lists: Iterable[Sequence[_Any]]) -> list[_Any]:
    """The first of every list, then the second of every list that has one, and so on."""
    nothing = object()
    turns = zip_longest(*lists, fillvalue=nothing)
    return [one for turn in turns for one in turn if one is not nothing]  # type: ignore[misc]
