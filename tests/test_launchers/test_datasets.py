"""`dualtoken verify`, `show` and `stats` on a real data set, whole and damaged."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.shards.code_shards import CodeSample, DatasetManifest, ShardWriter, iterate_shard
from data_pipeline.streams import prepare_dataset
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from launchers import datasets
from tests.support.command import call
from tests.support.tiny_run import write_codes


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two untrained tokenizers, and codes that are said to be the first one's."""
    folder = tmp_path_factory.mktemp("datasets")
    for name in ("tokenizer", "other"):
        torch.manual_seed(len(name))
        DualTokenVisualTokenizer(preset_config("tiny")).save_pretrained(folder / name)
    write_codes(folder / "codes", DualTokenVisualTokenizer.from_pretrained(folder / "tokenizer"), 0, 6)
    prepare_dataset(folder / "codes")
    return folder


@pytest.fixture
def dualtoken(source, tmp_path, monkeypatch, capsys):
    """Run the command beside a copy of the data; returns exit code, lines printed and lines of errors."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code, out, err = call(words, capsys)
        return code, out.splitlines(), err.splitlines()

    return run


def test_verify(dualtoken, tmp_path):
    code, lines, errors = dualtoken("verify", "codes", "--visual-tokenizer", "tokenizer")
    assert not errors
    assert code == 0
    assert "1 shards, 6 samples, 6 images of 16 positions x 2 codebooks x 2 depths" in lines[0]
    assert "those of this tokenizer" in lines[2]
    code, lines, _ = dualtoken("verify", "codes")
    assert code == 0 and "not compared" in lines[2]
    code, _, errors = dualtoken("verify", "codes", "--visual-tokenizer", "other")
    assert code == 2 and len(errors) == 1 and "pretokenize again" in errors[0]
    shard = tmp_path / "codes" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    code, _, errors = dualtoken("verify", "codes")
    assert code == 2 and len(errors) == 1 and "shard-000000.tar" in errors[0]


def test_verify_looks_at_the_index_and_the_rejected(dualtoken, tmp_path):
    codes = tmp_path / "codes"

    def problem():
        code, _, errors = dualtoken("verify", "codes")
        assert code == 2 and len(errors) == 1
        return errors[0]

    index = codes / "shard-000000.tar.idx"
    kept = index.read_bytes()
    index.unlink()
    assert "its index shard-000000.tar.idx is missing; prepare the data set again" in problem()
    index.write_bytes(kept)
    info = codes / ".nv-meta" / ".info.json"
    kept = info.read_text(encoding="utf-8")
    info.write_text(kept.replace("6", "5"), encoding="utf-8")
    assert "codes: 5 samples in the index, 6 in dataset.json; prepare the data set again" in problem()
    info.write_text(kept, encoding="utf-8")
    manifest = DatasetManifest.load(codes)
    shard = manifest.shards["shard-000000.tar"]
    manifest.rejected = shard.rejected = 1
    manifest.samples_in = shard.samples_in = 7
    manifest.save(codes)
    assert "rejected.jsonl: 0 lines, dataset.json counts 1 rejected samples" in problem()
    (codes / "rejected.jsonl").write_text(
        json.dumps({"shard": "a.tar", "key": "k", "reason": "r"}) + "\n", encoding="utf-8"
    )
    assert dualtoken("verify", "codes")[0] == 0
    shutil.rmtree(codes / ".nv-meta")
    assert "the Energon index (.nv-meta) is missing" in problem()


def test_show(dualtoken, tmp_path):
    code, lines, _ = dualtoken("show", "codes", "picture01", "--visual-tokenizer", "tokenizer")
    assert code == 0
    assert lines[0] == "[given] image shown/picture01-0.png" and lines[1] == "[learned] green"
    assert lines[2:] == ["caption, en: green", "caption, de: gelb"]
    assert Image.open(tmp_path / "shown" / "picture01-0.png").size == (16, 16)
    code, _, errors = dualtoken("show", "codes", "no-such", "--visual-tokenizer", "tokenizer")
    assert code == 2 and "no sample 'no-such'; its keys look like picture00" in errors[0]
    code, _, errors = dualtoken("show", "codes", "picture01", "--visual-tokenizer", "other")
    assert code == 2 and "pretokenize again" in errors[0]


def test_show_reads_one_sample_by_the_index(dualtoken, tmp_path):
    shard = tmp_path / "codes" / "shard-000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(b"x" * 512 + data[512:])  # the first sample is damaged, the others are not touched
    assert dualtoken("show", "codes", "picture01", "--visual-tokenizer", "tokenizer")[0] == 0
    code, _, errors = dualtoken("show", "codes", "picture00", "--visual-tokenizer", "tokenizer")
    assert code == 2 and len(errors) == 1 and "sample 'picture00' cannot be read" in errors[0]
    (tmp_path / "codes" / ".nv-meta" / "index.sqlite").unlink()
    code, _, errors = dualtoken("show", "codes", "picture01", "--visual-tokenizer", "tokenizer")
    assert code == 2 and ".nv-meta/index.sqlite is missing; prepare the data set again" in errors[0]


def test_show_of_a_sample_without_pictures(dualtoken, tmp_path):
    codes = tmp_path / "codes"
    manifest = DatasetManifest.load(codes)
    with ShardWriter(codes / "text.tar", manifest.geometry) as writer:
        writer.write(CodeSample("talk", np.zeros((0, *manifest.geometry.shape), "uint16"), [{"text": "hi"}]))
    writer.entry.samples_in = 1
    manifest.add("text.tar", writer.entry)
    manifest.save(codes)
    prepare_dataset(codes)
    code, lines, errors = dualtoken("show", "codes", "talk", "--visual-tokenizer", "tokenizer")
    assert (code, lines, errors) == (0, ["[learned] hi"], [])
    assert not any((tmp_path / "shown").glob("*"))


@pytest.mark.parametrize("codes_at_a_time", [1, 100, 1 << 20])
def test_stats(dualtoken, monkeypatch, codes_at_a_time):
    counts = []
    monkeypatch.setattr(datasets, "_CODES_AT_A_TIME", codes_at_a_time)
    monkeypatch.setattr(np, "bincount", lambda *a, real=np.bincount, **k: counts.append(1) or real(*a, **k))
    code, lines, _ = dualtoken("stats", "codes")
    assert len(counts) == {1: 6, 100: 3, 1 << 20: 1}[codes_at_a_time]  # of 6 samples with 64 codes each
    assert code == 0
    assert lines[0].startswith("6 samples, 6 images, ")
    assert lines[1:4] == [
        "images a sample: 1: 6",
        "parts: 6 images, 6 texts",
        "letters of text a sample: median 5, longest 6",
    ]
    assert [line.split()[:2] for line in lines[5:]] == [
        ["pixel", "1"],
        ["pixel", "2"],
        ["semantic", "1"],
        ["semantic", "2"],
    ]
    used, perplexity = (float(word.strip("%")) for word in lines[5].split()[2:])
    # 96 draws from 32 codes: nearly all occur, nearly evenly.
    assert 80 < used <= 100 and 20 < perplexity < 32
    own = np.concatenate([sample.codes for sample in iterate_shard("codes/shard-000000.tar")])
    share = np.bincount(own[:, :, 1, 0].ravel(), minlength=32) / own[:, :, 1, 0].size
    assert lines[7].split()[2:] == [
        f"{(share > 0).mean():.1%}",
        f"{np.exp(-sum(p * np.log(p) for p in share if p)):.1f}",
    ]
