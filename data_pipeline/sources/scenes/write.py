"""Choosing scenes to train on and to hold out, and their samples for image-text shards."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_pipeline.sources.scenes.captions import captions
from data_pipeline.sources.scenes.parts import (
    KINDS,
    Combination,
    Item,
    Scene,
    all_scenes,
)
from data_pipeline.sources.scenes.pictures import draw_scene, encoded
from data_pipeline.sources.scenes.questions import conversation

# Of each scene one conversation asks so; the questions of a kind are few, its pictures are many.
ASKED = ("what", "colour", "count", "where", "yesno", "yesno", "choice")
_SHARES = {"single": 0.3, "several": 0.3, "pair": 0.4}


def training_scenes(count: int, held_out: frozenset[Combination], draw: random.Random) -> list[Scene]:
    """Draw different scenes without any held-out combination: one thing, several of one, or two things.

    Raises:
        ValueError: more than there are.
    """
    groups: dict[str, list[Scene]] = {name: [] for name in _SHARES}
    for scene in all_scenes():
        if held_out.isdisjoint(scene.combinations()):
            groups[scene.shape].append(scene)
    if count > sum(map(len, groups.values())):
        raise ValueError(f"{count} scenes asked for, there are {sum(map(len, groups.values()))} to train on")
    chosen: list[Scene] = []
    for name in ("single", "several"):
        chosen += draw.sample(groups[name], min(round(count * _SHARES[name]), len(groups[name])))
    chosen += draw.sample(groups["pair"], min(count - len(chosen), len(groups["pair"])))
    draw.shuffle(chosen)
    return chosen


def held_out_scenes(held_out: frozenset[Combination], draw: random.Random) -> list[Scene]:
    """Draw different scenes that show one held-out combination, as many as show each kind as often."""
    by_kind: dict[str, dict[Combination, list[Scene]]] = {
        kind: {one: [] for one in sorted(held_out) if one.kind == kind} for kind in KINDS
    }
    for scene in all_scenes():
        # A scene with two of them stands for neither.
        if len(shown := held_out.intersection(scene.combinations())) == 1:
            one = next(iter(shown))
            by_kind[one.kind][one].append(scene)
    pools = []
    for kind in KINDS:
        lists = list(by_kind[kind].values())
        for scenes in lists:
            draw.shuffle(scenes)
        # In turns, so that every combination of a kind is there as often.
        pools.append([scene for several in zip(*lists, strict=False) for scene in several])
    chosen = [scene for several in zip(*pools, strict=False) for scene in several]
    draw.shuffle(chosen)
    return chosen


def scene_samples(
    scenes: Sequence[Scene],
    prefix: str,
    size: int,
    languages: Sequence[str],
    held_out: frozenset[Combination],
    draw: random.Random,
) -> list[dict[str, Any]]:
    """Samples of image-text shards: picture, a caption a language, a conversation, and what is shown."""
    samples = []
    for number, scene in enumerate(scenes):
        record = {
            "captions": {language: draw.choice(captions(scene, language)) for language in languages},
            "conversations": conversation(scene, draw, ASKED, held_out),
            "scene": asdict(scene),
        }
        samples.append(
            {
                "__key__": f"{prefix}-{number:05d}",
                "png": encoded(draw_scene(scene, size)),
                "json": json.dumps(record, ensure_ascii=False).encode(),
            }
        )
    return samples


def read_scene(record: dict[str, Any]) -> Scene:
    """The scene of a sample's json.

    Raises:
        ValueError: it has none.
    """
    found = record.get("scene")
    if not isinstance(found, dict):
        raise ValueError("no `scene` among the json's fields; expected a sample of the sample data's scenes")
    return Scene(found["layout"], tuple(Item(**item) for item in found["items"]), found["background"])
