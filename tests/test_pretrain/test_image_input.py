"""Pictures decoded ahead of a step: the same pictures, within a bound, and a state of what was used."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.images.decoding import build_image_decoder
from data_pipeline.streams import ImageStreamConfig, ImageTextBatch, image_loader, prepare_dataset
from pretrain.image_input import AHEAD, ImageInput, ImageInputConfig, ImagesAhead
from pretrain.timing import StepClock
from tests.test_data_pipeline.pretokenize.test_pretokenize import picture
from tests.test_data_pipeline.streams.test_streams import write_tar

SIZE = 16
BROKEN = ("k0007", "k0021")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    members: list[tuple[str, bytes]] = []
    for index in range(30):
        key = f"k{index:04d}"
        data = picture(index)
        members += [(f"{key}.png", data[:99] if key in BROKEN else data), (f"{key}.txt", key.encode())]
    write_tar(folder / "s.tar", members)
    prepare_dataset(folder)
    return folder


def image_input(folder: Path) -> ImageInput:
    device = torch.device("cpu")
    runtime = SimpleNamespace(device=device, run_dir=folder, step=0, clock=StepClock(device))
    return ImageInput(ImageInputConfig(), SIZE, runtime)


def open_ahead(shards: Path, images: ImageInput, size: int = 4) -> ImagesAhead:
    return images.ahead(image_loader(ImageStreamConfig(str(shards), shuffle_buffer_size=5), size))


class Stream:
    """Micro-batches 0, 1, ... of one picture each; an error in the place of one of them."""

    def __init__(self, broken: int = -1) -> None:
        self.taken, self.broken = 0, broken

    def __next__(self) -> ImageTextBatch:
        number, self.taken = self.taken, self.taken + 1
        if number == self.broken:
            raise ValueError(f"micro-batch {number}")
        return ImageTextBatch([str(number)], [picture(number)], [{}])


def test_pictures_are_those_of_decoding_in_the_step(shards: Path, tmp_path: Path) -> None:
    images = image_input(tmp_path)
    plain = image_loader(ImageStreamConfig(str(shards), shuffle_buffer_size=5), 4)
    decoder = build_image_decoder(SIZE)
    (tmp_path / "rejected.jsonl").touch()
    batches = iter(open_ahead(shards, images))
    for step in range(20):
        images.runtime.step = step
        batch, expected = next(batches), next(plain)
        assert batch.keys == expected.keys
        decoded = decoder(expected.image_bytes)
        for _ in range(2):  # a second time it is no longer expected, and decoded anew
            found, places = images(batch)
            assert torch.equal(found, decoded.images) and places == decoded.kept
        held_out, _ = images(ImageTextBatch(["other"], [picture(99)], [{}]))  # as validation does between
        assert torch.equal(held_out, decoder([picture(99)]).images)
        # Told in the step that uses it, not in the one in which it was decoded.
        lines = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        told = [json.loads(line) for line in lines]
        assert all(line["step"] <= step for line in told)
        assert {line["key"] for line in told if line["step"] == step} <= set(batch.keys)
    assert sorted(line["key"] for line in told) == sorted(BROKEN)


@pytest.mark.parametrize("micro_steps", [1, 5])
def test_the_next_ones_are_decoded_while_a_step_is_at_its_own(tmp_path: Path, micro_steps: int) -> None:
    images, stream = image_input(tmp_path), Stream()
    batches = images.ahead(stream)  # type: ignore[arg-type]
    decode, started, threads = images.decoder, threading.Semaphore(0), set[str]()
    count = 0

    def counting(encoded: list[bytes]) -> object:
        nonlocal count
        count += 1
        threads.add(threading.current_thread().name)
        started.release()
        return decode(encoded)

    images._decode.decoder = counting  # type: ignore[assignment]
    used = 0
    for _ in range(4):
        micro_batches = [next(batches) for _ in range(micro_steps)]
        assert stream.taken == used + micro_steps + AHEAD
        for batch in micro_batches:
            images(batch)
            used += 1
            for _ in range(used + AHEAD - count):
                assert started.acquire(timeout=30)  # without being asked for
            while started.acquire(blocking=False):
                pass
            assert count <= used + AHEAD  # and no more than these
    assert threads == {"decoding_0"}
    waited = images.runtime.clock.waited
    assert 0 < waited == pytest.approx(images.runtime.clock.pop()["data"]) and not images.runtime.clock.waited


def test_an_error_comes_in_its_place(tmp_path: Path) -> None:
    batches = image_input(tmp_path).ahead(Stream(broken=3))  # type: ignore[arg-type]
    assert [next(batches).keys for _ in range(3)] == [["0"], ["1"], ["2"]]
    with pytest.raises(ValueError, match="micro-batch 3"):
        next(batches)
    assert next(batches).keys == ["4"]  # as the stream itself would go on


def test_an_error_of_the_decoder_comes_where_its_pictures_are_used(tmp_path: Path) -> None:
    images = image_input(tmp_path)
    batches = images.ahead(Stream())  # type: ignore[arg-type]
    decode = images.decoder

    def broken(encoded: list[bytes]) -> object:
        if encoded == [picture(2)]:
            raise RuntimeError("out of memory")
        return decode(encoded)

    images._decode.decoder = broken  # type: ignore[assignment]
    for number in range(5):
        batch = next(batches)
        if number == 2:
            with pytest.raises(RuntimeError, match="out of memory"):
                images(batch)
        else:
            assert len(images(batch)[0]) == 1


@settings(deadline=None, max_examples=10)
@given(stops=st.lists(st.integers(0, 6), min_size=1, max_size=3), ranks=st.sampled_from([1, 2]))
def test_nothing_taken_ahead_is_lost_or_doubled_by_a_resume(
    shards: Path, tmp_path_factory: pytest.TempPathFactory, stops: list[int], ranks: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    plain = image_loader(ImageStreamConfig(str(shards), shuffle_buffer_size=5), 4)
    expected = [next(plain).keys for _ in range(sum(stops) + 3)]

    def loaders(count: int) -> list[ImagesAhead]:
        config = ImageStreamConfig(str(shards), shuffle_buffer_size=5)
        return [
            image_input(folder).ahead(image_loader(config, 4 // count, rank, count)) for rank in range(count)
        ]

    found, states = [], None
    for number, steps in enumerate([*stops, 3]):
        running = loaders(ranks if number else 1)  # the run begins with one rank and goes on with these
        if states is not None:
            for loader in running:
                loader.restore_states(states)
        for _ in range(steps):
            found.append([key for loader in running for key in next(loader).keys])
        states = json.loads(json.dumps([loader.save_state() for loader in running]))
    assert found == expected
