import math
from collections import Counter

import pytest

from data_pipeline.sources.scenes.parts import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    LAYOUTS,
    THINGS,
    Combination,
    Item,
    Scene,
    all_combinations,
    hold_out,
    pair_of,
)
from tests.support.any_scene import ALL_SCENES, scene


def test_every_scene_is_there_once():
    assert len(ALL_SCENES) == len(set(ALL_SCENES))
    items = 12 * 5
    pairs = items * (items - 5)  # the other is another thing
    assert len(ALL_SCENES) == 3 * (5 * items + 3 * items + 2 * pairs)
    assert {one.background for one in ALL_SCENES} == BACKGROUNDS.keys()
    assert {one.layout for one in ALL_SCENES} == LAYOUTS.keys()


def test_cells_of_a_layout_are_in_the_picture_and_do_not_overlap():
    for cells in LAYOUTS.values():
        assert all(0 <= step <= 2 for cell in cells for step in cell)
        for number, (right, down) in enumerate(cells):
            assert all(abs(right - x) >= 2 or abs(down - y) >= 2 for x, y in cells[:number])


@pytest.mark.parametrize(
    ("one", "drawings", "combinations"),
    [
        (scene("middle", "red car"), [("red car", (1, 1))], ["red car"]),
        (
            scene("three", "blue bell"),
            [("blue bell", (0, 0)), ("blue bell", (2, 0)), ("blue bell", (1, 2))],
            ["blue bell", "three bell"],
        ),
        (
            scene("side by side", "green frog", "red car"),
            [("green frog", (0, 1)), ("red car", (2, 1))],
            ["green frog", "red car", "car with frog"],
        ),
        (
            scene("one above the other", "red car", "green frog"),
            [("red car", (1, 0)), ("green frog", (1, 2))],
            ["red car", "green frog", "car with frog"],
        ),
    ],
)
def test_what_a_scene_shows(one, drawings, combinations):
    assert [(f"{item.colour} {item.thing}", cell) for item, cell in one.placed()] == drawings
    assert list(map(str, one.combinations())) == combinations


def test_wrong_scenes_are_refused():
    with pytest.raises(ValueError, match="layout is 'five', expected one of top left, .*one above the other"):
        scene("five", "red car")
    with pytest.raises(ValueError, match="1 items side by side, expected 2"):
        scene("side by side", "red car")
    with pytest.raises(ValueError, match="2 items two, expected 1"):
        Scene("two", (Item("car", "red"), Item("bell", "red")))


def test_pairs_have_no_order():
    assert pair_of("frog", "car") == pair_of("car", "frog") == Combination("pair", "car", "frog")


def test_what_openmoji_draws_may_not_be_held_out():
    may = set(map(str, all_combinations()))
    assert len(may) == len(all_combinations())
    assert {"blue star", "purple car", "four frog", "car with frog"} <= may
    assert not may & {
        *("red car", "purple heart", "green book", "blue circle", "yellow bell", "yellow triangle"),
        *("three book", "two heart", "three star", "two fish", "red fish", "balloon with fish"),
    }


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_held_out_are_a_seeded_share_of_each_kind(share):
    every = set(all_combinations())
    for seed in range(40):
        chosen = hold_out(share, seed)
        assert chosen <= every and chosen == hold_out(share, seed)
        assert Counter(one.kind for one in chosen) == {
            "colour": math.ceil(share * 60), "number": math.ceil(share * 36), "pair": math.ceil(share * 66)
        }  # fmt: skip
    assert len({hold_out(share, seed) for seed in range(40)}) == 40


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_every_part_keeps_most_of_its_combinations(share):
    for seed in range(40):
        chosen = hold_out(share, seed)
        for kind in ("colour", "number"):
            here = [one for one in chosen if one.kind == kind]
            assert max(Counter(one.thing for one in here).values()) == 1
            assert max(Counter(one.other for one in here).values()) <= 2
        partners = Counter(thing for one in chosen if one.kind == "pair" for thing in (one.thing, one.other))
        assert max(partners.values()) <= 2
        assert {one.kind for one in chosen} == set(KINDS)


@pytest.mark.parametrize("share", [0, -0.1, 0.26, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=f"held_out is {share}, expected a share above 0 and at most 0.25"):
        hold_out(share, 0)


def test_a_dozen_things_in_five_colours():
    assert len(THINGS) == 12 and len(COLOURS) == 5
    assert len({thing.key for thing in THINGS.values()}) == 12
