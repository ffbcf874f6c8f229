"""Streams that go on with another number of ranks, workers or samples in a micro-batch: the same sequence."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from megatron.energon import get_savable_loader

from data_pipeline.streams import BlendEntry, image_loader, reader
from data_pipeline.streams.dealing import Dealing
from data_pipeline.streams.reader import worker_config
from tests.test_data_pipeline.streams import test_document_streams as documents
from tests.test_data_pipeline.streams.test_streams import config, write_image_shards

SAMPLES = 144  # every number of readers and batch size below divides it


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_shards(tmp_path_factory.mktemp("images"), 3, SAMPLES // 3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [documents.pair(index) for index in range(documents.SAMPLES)]
    return documents.write_code_shards(tmp_path_factory.mktemp("codes"), samples)


def in_turn(ranks: list, micro_steps: int) -> list:
    """The micro-batches of all ranks in the order of a run's sequence."""
    return [next(loader) for _ in range(micro_steps) for loader in ranks]


def close(ranks: list) -> None:
    for loader in ranks:
        loader.close()


def moved(ranks: list, others: list) -> list:
    """`others` where `ranks` stand, by way of a file."""
    states = json.loads(json.dumps([loader.save_state() for loader in ranks]))
    close(ranks)
    for loader in others:
        loader.restore_states(states)
    return others


def keys(batches: list) -> list[str]:
    return [key for batch in batches for key in batch.keys]


starts = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
phases = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 5)), max_size=5)


@given(starts, phases)
def test_any_micro_batches_of_any_ranks_take_each_sample_once(start, phases):
    dealing, dealt, found = Dealing(*start), 0, []
    assert sorted(dealing.share(turn) for turn in range(dealing.readers)) == list(range(dealing.readers))
    for world_size, size, micro_steps in phases:
        step = world_size * size
        turns = [set(dealing.turns(dealt + rank * size, size, step)) for rank in range(world_size)]
        for _ in range(micro_steps):
            for rank in range(world_size):
                parts = dealing.parts(dealt + rank * size, size)
                assert {part.turn for part in parts} <= turns[rank]
                for part in parts:
                    assert part.whole == (part.stop - part.start == dealing.batch_size)
                    found += [(part.number, part.turn, at) for at in range(part.start, part.stop)]
            dealt += step
        for turn in range(dealing.readers):  # what is still needed of each reader, and no batch before it
            number = dealing.number(turn, dealt)
            assert all(used < (number, turn, dealt % dealing.batch_size) for used in found if used[1] == turn)
            assert number == 0 or (number - 1, turn, 0) in found
    assert found == sorted(found) and len(set(found)) == len(found) == dealt


def test_rank_reads_as_energon_does_with_several_workers(images: Path) -> None:
    for split in ("train", "val"):
        stream = image_loader(config(images, num_workers=2), 4, 1, 2, seed=3, split=split)
        energon = get_savable_loader(stream._build(worker_config(1, 2, 2, 3, "skip"), 4))
        assert keys(islice(stream, 15)) == keys(islice(energon, 15))
        stream.close()
        energon._iterator._shutdown_workers()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(began=(1, 1), phases=[(4, 6, 4), (4, 6, 4), (4, 6, 4)], shuffle=0)  # into a third pass
@given(
    began=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    phases=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([None, 1, 2, 3, 6]), st.integers(0, 4)), max_size=4
    ),
    shuffle=st.sampled_from([0, 8]),
)
def test_a_pass_over_images_on_changing_ranks(images: Path, began, phases, shuffle) -> None:
    """Each picture once in a pass, in the order of a run that was never stopped."""
    readers, batch_size = began

    def loaders(world_size: int, size: int) -> list:
        data = config(images)
        data.shuffle_buffer_size = shuffle
        return [image_loader(data, size, rank, world_size) for rank in range(world_size)]

    phases = [*phases, (1, None, 1), (readers, batch_size, 3)]
    taken = 2 * readers * batch_size + sum(w * (size or batch_size) * n for w, size, n in phases)
    expected = keys(in_turn(loaders(readers, batch_size), -(-max(taken, SAMPLES) // readers // batch_size)))
    if not shuffle:  # with a buffer passes overlap
        assert Counter(expected[:SAMPLES]) == Counter(f"k{index:04d}" for index in range(SAMPLES))
    ranks, found = loaders(readers, batch_size), []
    found += keys(in_turn(ranks, 2))
    for world_size, size, micro_steps in phases:
        ranks = moved(ranks, loaders(world_size, size or batch_size))
        found += keys(in_turn(ranks, micro_steps))
    assert len(found) == taken and found == expected[:taken]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4))
def test_packs_on_changing_ranks(pairs: Path, readers: int, phases) -> None:
    """The packs of a run that was never stopped, documents that wait for theirs included, and its counts."""
    data = documents.config(BlendEntry(str(pairs), "generate"), prompt_dropout=0.5)

    def loaders(world_size: int) -> list:
        return [documents.loader(data, rank, world_size) for rank in range(world_size)]

    phases = [(readers, 2), *phases]
    total = sum(world_size * micro_steps for world_size, micro_steps in phases)
    whole = loaders(readers)
    expected = in_turn(whole, -(-total // readers))[:total]
    ranks, found = loaders(readers), []
    for world_size, micro_steps in phases:
        ranks = moved(ranks, loaders(world_size))
        found += in_turn(ranks, micro_steps)
    assert all(documents.same(a, b) for a, b in zip(expected, found, strict=True))
    statistics = [stream.statistics for stream in ranks]
    assert sum(counts.packs for counts in statistics) == total
    assert sum(counts.documents[0] for counts in statistics) == len(keys(found))


def test_own_processes_go_on_where_this_process_stopped_and_back(
    images: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_KEEP_SECONDS", 0.0)  # else only the state of the beginning is kept
    data = documents.config(BlendEntry(str(pairs), "generate"), prompt_dropout=0.5)

    def image_ranks(world_size: int, num_workers: int, size: int = 4) -> list:
        settings = config(images, num_workers=num_workers)
        return [image_loader(settings, size, rank, world_size) for rank in range(world_size)]

    def document_ranks(world_size: int, num_workers: int) -> list:
        data.num_workers = num_workers
        return [documents.loader(data, rank, world_size) for rank in range(world_size)]

    expected = keys(in_turn(image_ranks(2, 0), 11))
    ranks = image_ranks(1, 2)
    found = keys(in_turn(ranks, 9))
    changes = ((2, 0, 4, 2), (1, 1, 2, 5), (3, 1, 2, 1), (1, 0, 8, 2))
    for world_size, num_workers, size, micro_steps in changes:
        ranks = moved(ranks, image_ranks(world_size, num_workers, size))
        found += keys(in_turn(ranks, micro_steps))
        if num_workers:
            places = [place for loader in ranks for _, place in loader.save_state()["readers"]]
            assert min(place["batches"] for place in places) > 1
    close(ranks)
    assert found == expected[: len(found)]

    whole = document_ranks(2, 0)
    expected = in_turn(whole, 8)
    ranks = moved(moved(document_ranks(2, 1), document_ranks(2, 1)), document_ranks(2, 1))
    found = in_turn(ranks, 3)
    ranks = moved(ranks, document_ranks(1, 0))
    found += in_turn(ranks, 5)
    ranks = moved(ranks, document_ranks(1, 1))
    found += in_turn(ranks, 5)
    close(ranks)
    assert all(documents.same(a, b) for a, b in zip(expected, found, strict=True))


def test_statistics_of_all_ranks_go_to_the_first_of_others(pairs: Path) -> None:
    data = documents.config(BlendEntry(str(pairs), "generate"))
    two = [documents.loader(data, rank, 2) for rank in range(2)]
    in_turn(two, 4)
    states = [loader.save_state() for loader in two]
    three = [documents.loader(data, rank, 3) for rank in range(3)]
    for loader in three:
        loader.restore_states(states)
    assert [loader.statistics.packs for loader in three] == [8, 0, 0]
    assert three[0].statistics.documents == [sum(loader.statistics.documents[0] for loader in two)]
    assert three[1].statistics.figures() == {"left_out": 0}
    again = documents.loader(data, 1, 2)
    again.restore_states(states[1:])  # on as many ranks a rank's own is enough
    assert again.statistics == two[1].statistics
    assert documents.same(next(again), next(two[1]))


def test_states_that_do_not_fit_are_refused_in_one_line(images: Path) -> None:
    ranks = [image_loader(config(images), 2, rank, 2) for rank in range(2)]
    in_turn(ranks, 1)
    states = [loader.save_state() for loader in ranks]
    next(ranks[0])
    later = ranks[0].save_state()
    alone = image_loader(config(images), 2)
    for given_states, message in (
        (
            states[:1],
            r"the loader states of ranks \[0\], expected those of all 2; a rank's own is enough only",
        ),
        ([later, states[1]], "got 2 loader state.s. that are not of one run and step"),
        ([], "got 0 loader state"),
        ([{**states[0], "version": 2}, states[1]], "has version 2, expected 4: go on with the program"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            alone.restore_states(given_states)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has slice_length=7; resume with the same data settings"):
        changed = config(images)
        changed.slice_length = 7
        image_loader(changed, 2).restore_states(states)


def test_description_says_what_a_run_began_with(images: Path, capsys: pytest.CaptureFixture) -> None:
    ranks = [image_loader(config(images), 4, rank, 4) for rank in range(4)]
    assert ranks[0].describe() == "data: 4 reader(s), 1 for each of 4 rank(s)"
    in_turn(ranks, 1)
    states = [loader.save_state() for loader in ranks]
    eight = image_loader(config(images), 2, 0, 8)
    eight.restore_states(states)
    assert eight.describe() == (
        "data: 4 reader(s), 1 for each of 8 rank(s), shared: what a rank reads is used in part by it and in "
        "part by others; as this run began, 4 rank(s) x 1 of batches of 4"
    )
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(loader = image_loader.*?)```", page, re.S)
    exec(example, {"image_loader": image_loader, "config": config(images), "saved": states})
    assert f"# {capsys.readouterr().out}" == example.splitlines(keepends=True)[-1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_starting_draws_nothing_from_the_trainers_random_numbers(images: Path, num_workers: int) -> None:
    before = torch.get_rng_state()
    loader = image_loader(config(images, num_workers=num_workers), 2)
    next(loader)
    loader.close()
    assert torch.equal(torch.get_rng_state(), before)
