"""Scenes to be measured: what each shows, its picture, what the model reads of it, and its captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_pipeline.shards.code_shards import CodeSample
from data_pipeline.shards.image_text_shards import expand_inputs, read_shard
from data_pipeline.sources.scenes.parts import Scene
from data_pipeline.sources.scenes.write import read_scene
from dualtoken.unified_model.sequence import ImagePart
from eval.inputs import load_codes, pictures_of, stack_codes
from eval.metrics.images import to_unit_range
from eval.seeing import Sight


@dataclass(frozen=True)
class SceneSamples:
    """Some scenes of one split, in one order."""

    scenes: list[Scene]
    samples: list[CodeSample]
    pictures: Tensor  # [N, 3, S, S] in [0, 1]
    images: list[ImagePart]  # what the model reads of the pictures

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def codes(self) -> Tensor:
        """Codes [N, P, Q, D]."""
        return stack_codes(self.samples)


def read_scenes(images: Path) -> Iterator[tuple[str, Scene]]:
    """Keys and scenes of image-text shards.

    Raises:
        ValueError: a sample says no scene.
    """
    for shard in expand_inputs([str(images)]):
        for key, parts in read_shard(shard):
            try:
                yield key, read_scene(json.loads(parts["json"]))
            except ValueError as error:
                raise ValueError(f"{shard}: {key}: {error}") from None


def load_scenes(codes: Path, images: Path, sight: Sight, count: int, seed: int) -> SceneSamples:
    """Draw `count` scenes at random from shards of codes, with the pictures they were made from.

    Raises:
        DatasetError: `codes` holds no finished data set.
        ValueError: a sample says no scene, its picture is not in `images`, or it is the only one; a vision
            tower is missing.
    """
    samples = load_codes(codes, count, seed)
    if len(samples) < 2:
        raise ValueError(
            f"{len(samples)} scene from {codes}, expected at least 2: what is right by chance is what other "
            "scenes have; give a --count of 2 or more, or codes of more scenes"
        )
    pictures = pictures_of(samples, codes, images, sight.image_size)
    scenes = dict(read_scenes(images))
    seen = sight.look_at_samples(codes, samples, lambda: pictures)
    return SceneSamples([scenes[sample.key] for sample in samples], samples, to_unit_range(pictures), seen)
