"""Which parts of a scene are right, in a drawn picture or in a caption (as in GenEval, arXiv 2310.11513)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_pipeline.sources.scenes.parts import Scene
from eval.scenes.detector import Found

PARTS = ("object", "colour", "count", "position", "background")
ALL = "all"


def right_parts(scene: Scene, found: Found | None) -> dict[str, bool]:
    """Judge what was found against the scene that was meant; nothing is right of None.

    `object`: the things of the scene are there and no other. `colour`: each is in its colour, whatever else
    is there. `count`: each is there as often as it should. `position`: the right things stand in the right
    cells, in whatever colour. `background`. `all`: everything at once.
    """
    if found is None:
        return dict.fromkeys((*PARTS, ALL), False)
    meant = Found.of(scene)
    things = {item.thing for item in scene.items}
    seen = {item for item, _ in found.drawings}
    right = {
        "object": set(found.things()) == things,
        "colour": {item for item in seen if item.thing in things} == set(scene.items),
        "count": [name for name in found.things() if name in things] == meant.things(),
        "position": {(item.thing, cell) for item, cell in found.drawings}
        == {(item.thing, cell) for item, cell in meant.drawings},
        "background": found.background == meant.background,
    }
    return {**right, ALL: all(right.values())}


def shares(judged: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """How often each part is right."""
    return {part: sum(one[part] for one in judged) / len(judged) for part in (*PARTS, ALL)}
