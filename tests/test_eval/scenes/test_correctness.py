import pytest
from hypothesis import given

from data_pipeline.sources.scenes.parts import Item
from eval.scenes.correctness import ALL, PARTS, right_parts, shares
from eval.scenes.detector import Found
from tests.support.any_scene import any_scene, scene

CAR, BELL = scene("middle", "red car"), scene("two", "yellow bell")
PAIR = scene("side by side", "red car", "blue fish", background="grey")


def found(*drawings: tuple[str, int, int], background: str = "white") -> Found:
    """What stands where: `("red car", right, down)` in quarters of the picture."""
    placed = [(Item(*reversed(name.split())), (right, down)) for name, right, down in drawings]
    return Found(frozenset(placed), background)


@given(any_scene)
def test_all_is_right_of_the_scene_itself_and_nothing_of_none(one):
    assert right_parts(one, Found.of(one)) == dict.fromkeys((*PARTS, ALL), True)
    assert right_parts(one, None) == dict.fromkeys((*PARTS, ALL), False)


@pytest.mark.parametrize(
    ("meant", "seen", "wrong"),
    [
        (CAR, found(("red car", 1, 1), background="pink"), "background"),
        (CAR, found(("blue car", 1, 1)), "colour"),
        (CAR, found(("red car", 0, 0)), "position"),
        (CAR, found(("blue car", 0, 0)), "colour position"),
        (CAR, found(("red fish", 1, 1)), "object colour count position"),
        (CAR, found(), "object colour count position"),
        (CAR, found(("red car", 0, 1), ("red car", 2, 1)), "count position"),
        (CAR, found(("red car", 0, 1), ("blue car", 2, 1)), "colour count position"),
        (CAR, found(("red car", 1, 1), ("red bell", 0, 0)), "object position"),
        (BELL, found(("yellow bell", 0, 1)), "count position"),
        (BELL, found(("yellow bell", 1, 0), ("yellow bell", 1, 2)), "position"),
        (BELL, found(("yellow bell", 0, 1), ("red bell", 2, 1)), "colour"),
        (BELL, found(("yellow bell", 0, 1), ("yellow star", 2, 1)), "object count position"),
        (PAIR, found(("red car", 0, 1), ("blue fish", 2, 1)), "background"),
        (PAIR, found(("blue fish", 0, 1), ("red car", 2, 1), background="grey"), "position"),
        (PAIR, found(("blue car", 0, 1), ("red fish", 2, 1), background="grey"), "colour"),
        (PAIR, found(("red car", 0, 1), background="grey"), "object colour count position"),
        (
            PAIR,
            found(("red car", 0, 1), ("blue bell", 2, 1), background="grey"),
            "object colour count position",
        ),
        (PAIR, found(("red car", 1, 0), ("blue fish", 1, 2), background="pink"), "position background"),
    ],
)
def test_each_part_is_judged_by_itself(meant, seen, wrong):
    judged = right_parts(meant, seen)
    assert judged.keys() == {*PARTS, ALL} and not judged.pop(ALL)
    assert [part for part in PARTS if not judged[part]] == wrong.split()


def test_shares_count_each_part():
    judged = [
        right_parts(CAR, found(("red car", 1, 1))),
        right_parts(CAR, found(("blue car", 1, 1))),
        right_parts(CAR, found(("red car", 0, 0))),
        right_parts(CAR, None),
    ]
    assert shares(judged) == {
        "object": 0.75, "colour": 0.5, "count": 0.75, "position": 0.5, "background": 0.75, "all": 0.25
    }  # fmt: skip
