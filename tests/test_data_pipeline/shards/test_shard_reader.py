"""The short ways of the streams give what the long ones give: tar members, token ids, samples."""

import io
import logging
import os
import struct
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.structs import ShardInfo
from megatron.energon.rng import WorkerRng
from transformers import AutoTokenizer

from data_pipeline.errors import DatasetError
from data_pipeline.shards.index import prepare_dataset
from data_pipeline.shards.reader import LocalShardReader, _SliceRng
from data_pipeline.shards.tar_members import TarError, iterate_members, iterate_samples, locate_samples
from data_pipeline.streams.reader import worker_config
from data_pipeline.streams.text_encoding import TextEncoder
from dualtoken.unified_model.sequence import SPECIAL
from tests.test_data_pipeline.streams.test_document_streams import build_tokenizer
from tests.test_data_pipeline.streams.test_streams import write_tar

names = st.text(st.characters(exclude_characters="\0/.", exclude_categories=["Cs"]), min_size=1, max_size=150)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), min_size=1, max_size=5),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    st.booleans(),
)
def test_members_are_those_of_tarfile(members: list[tuple[str, bytes]], kind: int, in_folder: bool) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        if in_folder:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(f"folder/{name}" if in_folder else name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # ustar has room for 100 bytes and a folder
                return
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]
    buffer.seek(0)
    found = [(member.name, buffer.read(member.size)) for member in iterate_members(buffer)]
    assert found == expected


def test_a_stretch_that_ends_early_is_noticed() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 600
        tar.addfile(info, io.BytesIO(b"x" * 600))
        tar.addfile(info, io.BytesIO(b"x" * 600))
    whole = buffer.getvalue()
    for cut in (100, 512, 700, 1600, 1700, 2100):
        messages = "truncated: it ends (inside a file|without the empty block)"
        with pytest.raises(TarError, match=messages):
            list(iterate_samples(io.BytesIO(whole[:cut])))
        with pytest.raises(TarError, match=messages):
            locate_samples(io.BytesIO(whole[:cut]))
    with pytest.raises(TarError, match="no tar header at byte 0"):
        list(iterate_samples(io.BytesIO(b"not a tar" * 100)))
    assert [key for key, _ in iterate_samples(io.BytesIO(whole[:3072]), fragment=True)] == ["a"]


def packed(*keys: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in keys:
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = 600
            tar.addfile(info, io.BytesIO(key.encode() * 600))
    return buffer.getvalue()


def test_tars_one_after_another_are_read_to_the_end(tmp_path: Path) -> None:
    joined = packed("a", "b") + packed("c") + bytes(100)
    found = dict(iterate_samples(io.BytesIO(joined)))
    assert found == {key: {"txt": key.encode() * 600} for key in "abc"}
    assert [place.key for place in locate_samples(io.BytesIO(joined))[0]] == list("abc")
    (tmp_path / "a.tar").write_bytes(joined)
    prepare_dataset(tmp_path)
    shard = ShardInfo(name="a.tar", path=EPath(tmp_path / "a.tar"), count=3)
    reader = LocalShardReader([shard])
    assert [reader[index] and reader[index]["parts"]["txt"][:1] for index in range(3)] == [b"a", b"b", b"c"]
    given = []
    with pytest.raises(TarError, match=r"^data after the end of the tar at byte 10240$") as caught:
        given += [key for key, _ in iterate_samples(io.BytesIO(packed("a", "b") + b"<html>" * 100))]
    assert caught.value.unfinished == ("b", {"txt": b"b" * 600})
    with pytest.raises(TarError, match="data after the end of the tar"):
        list(iterate_samples(io.BytesIO(packed("a") + b"junk")))
    with pytest.raises(TarError, match="truncated: it ends inside a file"):
        locate_samples(io.BytesIO((packed("a") + packed("b"))[: 10240 + 700]))
    with pytest.raises(TarError, match="truncated: it ends without the empty block"):
        list(iterate_samples(io.BytesIO((packed("a") + packed("b"))[: 10240 + 1536])))


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardInfo]:
    write_tar(tmp_path / "a.tar", [("x/k0.png", b"0"), ("x/k0.json", b"{}"), ("k1.0.png", b"1" * 700)])
    write_tar(tmp_path / "b.tar", [("l" * 120 + ".txt", b"2"), ("k3.txt", b""), ("__meta__.txt", b"no")])
    prepare_dataset(tmp_path)
    return [ShardInfo(name=f"{n}.tar", path=EPath(tmp_path / f"{n}.tar"), count=2) for n in "ab"]


def test_samples_are_those_of_energons_reader(tmp_path: Path, shards: list[ShardInfo]) -> None:
    energon = ShardInfosITarReader(EPath(tmp_path), shards)
    reader = LocalShardReader(shards)
    for index in (3, 0, 2, 1, 1):
        expected = dict(energon[index])
        sample = reader[index]
        assert sample is not None
        assert sample["key"] == expected["__key__"]
        assert sample["restore_key"] == expected["__restore_key__"]
        assert sample["parts"] == {name: data for name, data in expected.items() if not name.startswith("__")}
        assert sample["shard"] == str(tmp_path / expected["__shard__"])


def test_transient_errors_are_tried_again(
    shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("data_pipeline.shards.remote_files.RETRY_SECONDS", (0, 0, 0))
    failures, pread = [3], os.pread

    def flaky(*arguments: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError("stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", flaky)
    assert LocalShardReader(shards)[1]["key"] == "k1"
    failures[0] = 4
    with pytest.raises(DatasetError, match=r"a\.tar: sample 1 cannot be read: stale file handle"):
        LocalShardReader(shards)[1]
    failures[0] = 4
    with caplog.at_level(logging.WARNING):
        assert LocalShardReader(shards, skip_unreadable=True)[1] is None
    assert "stale file handle" in caplog.text


def test_of_a_very_long_index_only_a_stretch_is_read(tmp_path: Path) -> None:
    """That of a shard of 4 million samples has 32 MB, and a shard is opened anew for each slice."""
    samples, content = 1 << 22, packed("a")
    (tmp_path / "a.tar").write_bytes(content)
    with open(tmp_path / "a.tar.idx", "wb") as index:
        index.seek(8 * (samples - 1))
        index.write(struct.pack("<2Q", 0, 1536))
    shard = ShardInfo(name="a.tar", path=EPath(tmp_path / "a.tar"), count=samples)
    tracemalloc.start()
    sample = LocalShardReader([shard])[samples - 1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sample is not None and sample["key"] == "a" and peak < 1 << 20
    os.truncate(tmp_path / "a.tar.idx", 8 * samples)
    with pytest.raises(
        DatasetError, match=r"a\.tar: sample 4194303 .*: its index is shorter than its samples"
    ):
        LocalShardReader([shard])[samples - 1]


def test_samples_on_both_sides_of_a_stretch_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.shards.reader._OFFSETS_AT_A_TIME", 3)
    write_tar(tmp_path / "a.tar", [(f"k{index}.txt", b"%d" % index * index) for index in range(8)])
    prepare_dataset(tmp_path)
    reader = LocalShardReader([ShardInfo(name="a.tar", path=EPath(tmp_path / "a.tar"), count=8)])
    for index in (0, 2, 3, 1, 7, 6, 5, 4, 3):
        sample = reader[index]
        assert sample is not None and sample["parts"] == {"txt": b"%d" % index * index}


def test_slices_are_drawn_as_energon_draws_them() -> None:
    workers = worker_config(0, 1, 0, seed=3)
    energons, ours = WorkerRng(workers), _SliceRng(workers)
    weights = torch.tensor([5.0, 0.0, 100.0, 1.0])
    drawn = []
    for step in range(300):
        if step % 50 == 49:
            weights[step % 4] = step % 3  # as one slice takes the place of another, or none does
        drawn.append(ours.choice_idx(weights))
        assert drawn[-1] == energons.choice_idx(weights)
    assert len(set(drawn)) > 2
    assert ours.save_state() == energons.save_state()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=300) | st.sampled_from(list(SPECIAL.values())), max_size=4).map("".join),
    st.booleans(),
)
def test_token_ids_are_those_of_the_tokenizer(text: str, split: bool) -> None:
    tokenizer = build_tokenizer()
    encoder = TextEncoder(tokenizer)
    for _ in range(2):
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        assert encoder(text, add_special_tokens=False, split_special_tokens=split)["input_ids"] == expected
        assert encoder(text, split_special_tokens=not split)["input_ids"] is not expected


def test_texts_are_neither_cut_nor_padded_as_in_a_call_before(tmp_path: Path) -> None:
    """A tokenizer's file keeps how the last call cut and padded."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = SPECIAL["end_of_text"]
    expected = tokenizer("some words", add_special_tokens=False)["input_ids"]
    encoder = TextEncoder(tokenizer)
    for text in ("some words", "some words" * 50):  # remembered, and too long for that
        tokenizer("x", truncation=True, max_length=3, padding="max_length")
        assert encoder(text)["input_ids"] == expected * (len(text) // 10)
    tokenizer("x", truncation=True, max_length=3, padding="max_length")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.truncation is not None
    assert TextEncoder(loaded)("some words")["input_ids"] == expected
