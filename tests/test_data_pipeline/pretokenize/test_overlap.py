"""Overlapped stages: the results, and the place of an error, are those of one thing after the other."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.pretokenize.overlap import DECODED_AHEAD, READ_AHEAD, WRITTEN_BEHIND, overlapped

STAGES = ("read", "decode", "encode", "write")


class Broken(Exception):
    """What a stage of these tests raises."""


def stages(
    count: int, broken: tuple[str, int] | None, pause: Callable[[str, int], float]
) -> tuple[Iterator[int], list[Callable[[int], int]], dict[str, list[int]]]:
    """Items 0 to `count`, the three other stages, and what each stage has done so far."""
    done: dict[str, list[int]] = {stage: [] for stage in STAGES}

    def step(stage: str, item: int) -> int:
        time.sleep(pause(stage, item))
        if broken == (stage, item):
            raise Broken(f"{stage} {item}")
        done[stage].append(item)
        return item

    def bound(stage: str) -> Callable[[int], int]:
        return lambda item: step(stage, item)

    items = (step("read", item) for item in range(count))
    return items, [bound(stage) for stage in STAGES[1:]], done


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 30),
    broken=st.none() | st.tuples(st.sampled_from(STAGES), st.integers(0, 29)),
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.002]), min_size=11, max_size=11),
)
def test_results_and_errors_are_those_of_one_after_the_other(
    count: int, broken: tuple[str, int] | None, pauses: list[float]
) -> None:
    threads = threading.active_count()
    items, functions, done = stages(count, broken, lambda stage, item: pauses[(len(stage) * 5 + item) % 11])
    results: list[int] = []
    fails = broken is not None and broken[1] < count
    try:
        for result in overlapped(items, *functions):
            results.append(result)
    except Broken as error:
        assert fails and str(error) == f"{broken[0]} {broken[1]}"
        # The cause is told: the line that raised is in the traceback.
        assert any(entry.name == "step" for entry in pytest.ExceptionInfo.from_exception(error).traceback)
    else:
        assert not fails
    expected = list(range(broken[1] if fails else count))
    assert results == expected == done["write"]  # all before the error, nothing behind it
    assert threading.active_count() == threads  # nothing goes on


@pytest.mark.parametrize("slow", STAGES)
def test_what_is_on_its_way_is_bounded(slow: str) -> None:
    """Whichever stage is slow, the ones before it wait."""
    ahead: dict[str, int] = dict.fromkeys(STAGES, 0)

    def pause(stage: str, item: int) -> float:
        for before, after in itertools.pairwise(STAGES):
            ahead[before] = max(ahead[before], len(done[before]) - len(done[after]))
        return 0.01 if stage == slow else 0.0

    items, functions, done = stages(40, None, pause)
    assert list(overlapped(items, *functions)) == list(range(40))
    assert ahead["read"] <= READ_AHEAD + 1
    assert ahead["decode"] <= DECODED_AHEAD + 1
    assert ahead["encode"] <= WRITTEN_BEHIND + 1
    if slow != "read":
        assert ahead[STAGES[STAGES.index(slow) - 1]] >= 2  # and did not wait without need


def test_the_first_items_are_read_when_they_are_needed() -> None:
    """Who begins does not claim more than it is at."""
    read_by: list[int] = []

    def encode(item: int) -> int:
        time.sleep(0.02)
        read_by.append(len(done["read"]))
        return item

    items, (decode, _, write), done = stages(20, None, lambda stage, item: 0.0)
    assert list(overlapped(items, decode, encode, write)) == list(range(20))
    ahead = [read - number - 1 for number, read in enumerate(read_by)]
    assert all(found <= min(DECODED_AHEAD + number, READ_AHEAD) for number, found in enumerate(ahead))
    assert max(ahead) == READ_AHEAD


def test_leaving_early_stops_all_stages() -> None:
    threads = threading.active_count()
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    for result in overlapped(endless(), lambda item: item, lambda item: item, lambda item: item):
        if result == 5:
            break
    assert closed.is_set() and threading.active_count() == threads


def test_stages_work_at_the_same_time() -> None:
    """Each stage waits until all four are at an item: without overlap they would wait for ever."""
    together = threading.Barrier(4, timeout=20)

    def read() -> Iterator[int]:
        for item in range(12):
            if item == 5:
                together.wait()  # while 4 is decoded, 3 is encoded, 2 is written
            yield item

    def at(place: int) -> Callable[[int], int]:
        def work(item: int) -> int:
            if item == place:
                together.wait()
            return item

        return work

    assert list(overlapped(read(), at(4), at(3), at(2))) == list(range(12))
    assert not together.broken
