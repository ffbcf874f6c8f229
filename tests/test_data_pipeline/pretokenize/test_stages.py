"""Pretokenize as overlapping stages: bytes and batches of the serial path, errors of each stage, claims."""

import errno
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import DatasetError
from data_pipeline.images.decoding import DecodedImages, build_image_decoder
from data_pipeline.pretokenize.command import pretokenize
from data_pipeline.pretokenize.shard_tokenizer import Rejection, Settings, ShardTokenizer
from data_pipeline.shards.code_shards import ShardWriter
from tests.test_data_pipeline.pretokenize.test_pretokenize import (
    SIZE,
    StandInTokenizer,
    check_complete,
    contents,
    picture,
    write_inputs,
)
from tests.test_data_pipeline.streams.test_streams import write_tar

SETTINGS = Settings(batch_size=5)


class Noting(StandInTokenizer):
    """Keeps what it was given together."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[torch.Tensor] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(images)
        return super().encode(images)


def start(inputs: Path, output: Path, tokenizer: StandInTokenizer | None = None) -> None:
    pretokenize(
        [str(inputs)], tokenizer or StandInTokenizer(), build_image_decoder(SIZE, "pil"), output, SETTINGS
    )


def test_bytes_and_batches_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in")
    overlapping, serial = Noting(), Noting()
    start(tmp_path / "in", tmp_path / "out", overlapping)
    (tmp_path / "serial").mkdir()
    tokenizer = ShardTokenizer(serial, build_image_decoder(SIZE, "pil"), SETTINGS)
    for path in sorted((tmp_path / "in").iterdir()):
        with ShardWriter(tmp_path / "serial" / path.name, tokenizer.geometry) as writer:
            for batch in tokenizer.read(str(path)):
                for item in tokenizer.collect(tokenizer.encode(tokenizer.decode(batch))):
                    if not isinstance(item, Rejection):
                        writer.write(item)
        assert (tmp_path / "serial" / path.name).read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert [len(batch) for batch in serial.batches] == [len(batch) for batch in overlapping.batches]
    assert all(torch.equal(*both) for both in zip(serial.batches, overlapping.batches, strict=True))


@pytest.mark.parametrize("stage", ["read", "decode", "encode", "write"])
def test_an_error_of_a_stage_keeps_what_is_before_it(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third of four shards; the same command then finishes what is left, with the same bytes."""
    expected = write_inputs(tmp_path / "in")
    start(tmp_path / "in", tmp_path / "undisturbed")
    output, threads = tmp_path / "out", threading.active_count()
    third = "k0024"  # a key of the third shard, whose picture is sound
    ids = ([str(tmp_path / "in")], StandInTokenizer(), build_image_decoder(SIZE, "pil"))
    _, tokenizer, decoder = ids
    with monkeypatch.context() as breaking:
        if stage == "read":
            whole = ShardTokenizer.read

            def read(self: ShardTokenizer, source: str, prefix: str = "") -> object:
                if source.endswith("in-002.tar"):
                    raise DatasetError("no third shard")
                return whole(self, source, prefix)

            breaking.setattr(ShardTokenizer, "read", read)
            error: type[Exception] = DatasetError
        elif stage == "decode":
            decode = type(decoder).__call__

            def broken(self: object, encoded: Sequence[bytes]) -> DecodedImages:
                if picture(24) in encoded:
                    raise MemoryError("no third shard")
                return decode(self, encoded)

            breaking.setattr(type(decoder), "__call__", broken)
            error = MemoryError
        elif stage == "encode":
            (image,), encode = decoder([picture(24)]).images, tokenizer.encode

            def broken_encode(images: torch.Tensor) -> torch.Tensor:
                if any(torch.equal(one, image) for one in images):
                    raise RuntimeError("no third shard")
                return encode(images)

            breaking.setattr(tokenizer, "encode", broken_encode)
            error = RuntimeError
        else:
            write = ShardWriter.write

            def full(self: ShardWriter, sample: object) -> None:
                if sample.key == third:  # type: ignore[attr-defined]
                    raise OSError(errno.ENOSPC, "no third shard")
                write(self, sample)  # type: ignore[arg-type]

            breaking.setattr(ShardWriter, "write", full)
            error = OSError
        with pytest.raises(error, match="no third shard"):
            pretokenize(*ids, output, SETTINGS)
    assert threading.active_count() == threads  # all stages have ended, nothing touches claims any more
    assert not list(output.glob(".*.tmp")) and not list(output.glob(".pretokenize/claims/*"))
    done = sorted(path.name for path in output.glob(".pretokenize/*.tar.json"))
    assert (
        done
        == ["in-000.tar.json", "in-001.tar.json"]
        == [f"{p.name}.json" for p in sorted(output.glob("*.tar"))]
    )
    start(tmp_path / "in", output)
    assert contents(output) == contents(tmp_path / "undisturbed")
    check_complete(output, expected)


def test_the_next_shard_is_claimed_before_the_present_one_ends(tmp_path: Path) -> None:
    """Of six batches a shard; and what is claimed at a time is bounded."""
    (tmp_path / "in").mkdir()
    for shard in range(4):
        members = []
        for index in range(30):
            members += [(f"k{shard}-{index:02d}.png", picture(index)), (f"k{shard}-{index:02d}.txt", b"text")]
        write_tar(tmp_path / "in" / f"in-{shard:03d}.tar", members)
    claimed: list[int] = []

    class Looking(StandInTokenizer):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            claimed.append(len(list((tmp_path / "out" / ".pretokenize" / "claims").glob("*.claim"))))
            return super().encode(images)

    start(tmp_path / "in", tmp_path / "out", Looking(delay=0.02))
    assert len(claimed) == 24 and claimed[0] == 1
    assert max(claimed) in (2, 3)  # three where one is still being written
    assert claimed[11] >= 2  # the last batch of the second shard
