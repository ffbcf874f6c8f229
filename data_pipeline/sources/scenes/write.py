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
from data_pipeline.sources.scenes.questions import ASKED, conversation

# Questions about a scene. Few, for a question tells something of the ones before it, and what is asked first
# should be of every kind often.
_TURNS = 3
_SHARES = {"single": 0.3, "several": 0.3, "pair": 0.4}


def training_scenes(count: int, held_out: frozenset[Combination], draw: random.Random) -> list[Scene]:
    """Draw scenes without any held-out combination: of one thing, of several of one, and of two things.

    There are fewer of the first two than of pairs: when all are drawn, they are drawn again, to be captioned
    and asked about in other words.
    """
    groups: dict[str, list[Scene]] = {name: [] for name in _SHARES}
    for scene in all_scenes():
        if held_out.isdisjoint(scene.combinations()):
            groups[scene.shape].append(scene)
    chosen: list[Scene] = []
    for name, share in _SHARES.items():
        wanted = round(count * share) if name != "pair" else count - len(chosen)
        while wanted:
            drawn = draw.sample(groups[name], min(wanted, len(groups[name])))
            chosen += drawn
            wanted -= len(drawn)
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
            "conversations": conversation(scene, draw, draw.sample(ASKED, _TURNS), held_out),
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
