"""Dual-code shards: round trip, same samples same bytes, and every kind of damage found."""

import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DatasetError
from data_pipeline.shards.code_shards import (
    CodeGeometry,
    CodeSample,
    DatasetManifest,
    FeatureGeometry,
    ShardWriter,
    iterate_shard,
    verify_dataset,
)

GEOMETRY = CodeGeometry(positions=4, num_quantizers=3, codebook_size=50)
FINGERPRINT = hashlib.sha256(b"tokenizer").hexdigest()


def make_sample(key: str, images: int = 1, seed: int = 0) -> CodeSample:
    codes = np.random.default_rng(seed).integers(0, GEOMETRY.codebook_size, (images, *GEOMETRY.shape))
    parts = [{"image": index, "loss": False} for index in range(images)] + [{"text": f"caption of {key}"}]
    return CodeSample(key, codes.astype(np.uint16), parts, {"en": f"caption of {key}"})


def write_dataset(folder: Path, shards: int = 2, samples: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = DatasetManifest(FINGERPRINT, 50, 3, 4, image_size=16)
    for shard in range(shards):
        name = f"shard-{shard:06d}.tar"
        with ShardWriter(folder / name, GEOMETRY) as writer:
            for index in range(samples):
                writer.write(make_sample(f"s{shard}-{index}", images=1 + index % 2, seed=shard * 10 + index))
        assert writer.entry is not None
        writer.entry.samples_in = samples
        manifest.add(name, writer.entry)
    manifest.save(folder)
    return folder


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def same(a: CodeSample, b: CodeSample) -> bool:
    return (a.key, a.parts, a.captions) == (b.key, b.parts, b.captions) and np.array_equal(a.codes, b.codes)


key_names = st.text("abcXYZ019_-äあ", min_size=1, max_size=130)


@st.composite
def samples(draw: st.DrawFn) -> list[CodeSample]:
    drawn = []
    for key in draw(st.lists(key_names, min_size=1, max_size=4, unique=True)):
        images = draw(st.integers(0, 3))
        seed = draw(st.integers(0, 1000))
        codes = np.random.default_rng(seed).integers(0, 50, (images, *GEOMETRY.shape)).astype(np.uint16)
        texts = [
            {"text": text, "loss": draw(st.booleans())}
            for text in draw(st.lists(st.text(max_size=20), max_size=3))
        ]
        parts = draw(
            st.permutations([{"image": index, "loss": index == 0} for index in range(images)] + texts)
        )
        captions = draw(st.none() | st.dictionaries(st.sampled_from(["en", "de"]), st.text(max_size=9)))
        drawn.append(CodeSample(key, codes, parts, captions))
    return drawn


@settings(max_examples=40, deadline=None)
@given(samples())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, drawn: list[CodeSample]) -> None:
    path = tmp_path_factory.mktemp("shards") / "a.tar"
    with ShardWriter(path, GEOMETRY) as writer:
        for sample in drawn:
            writer.write(sample)
    read = list(iterate_shard(path))
    assert len(read) == len(drawn)
    assert all(same(a, b) for a, b in zip(drawn, read, strict=True))
    assert all(sample.codes.dtype == np.uint16 for sample in read)


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first, second = write_dataset(tmp_path / "a"), write_dataset(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in second.iterdir()
    }
    with tarfile.open(first / "shard-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_nothing_is_left_of_a_shard_that_fails(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="a code is 50, expected codes below 50"),
        ShardWriter(tmp_path / "a.tar", GEOMETRY) as writer,
    ):
        writer.write(make_sample("good"))
        bad = make_sample("bad")
        bad.codes[0, 1, 1, 2] = 50
        writer.write(bad)
    assert list(tmp_path.iterdir()) == []


def test_a_key_with_a_dot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without dots"), ShardWriter(tmp_path / "a.tar", GEOMETRY) as writer:
        writer.write(make_sample("a.b"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"text": "no image"}], r"name the images \[\], expected each of 1"),
        ([{"image": 0}, {"image": 0}], r"name the images \[0, 0\]"),
        ([{"image": 0, "text": "both"}], "neither"),
        ([{"image": 0}, {}], "neither"),
        ("text", "expected a list"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, parts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path / "a.tar", GEOMETRY) as writer:
        writer.write(CodeSample("k", make_sample("k").codes, parts))


def test_verify_accepts_what_was_written(tmp_path: Path) -> None:
    manifest = verify_dataset(write_dataset(tmp_path), FINGERPRINT)
    assert (manifest.samples_in, manifest.samples_out, manifest.rejected, manifest.images) == (6, 6, 0, 8)
    assert manifest.geometry == GEOMETRY


def refused(folder: Path, message: str, fingerprint: str | None = FINGERPRINT) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        verify_dataset(folder, fingerprint)
    assert "\n" not in str(caught.value)


def test_verify_refuses_damage(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a")
    refused(folder, "made by the visual tokenizer .* expects 000000000000", "0" * 64)
    shard = folder / "shard-000001.tar"
    whole = shard.read_bytes()
    for cut in (700, 512 * 3, 512 * 5, len(whole) - 10000):
        shard.write_bytes(whole[:cut])
        refused(folder, r"shard-000001\.tar: truncated")
    position = whole.index(b"caption of")
    shard.write_bytes(whole[:position] + b"C" + whole[position + 1 :])
    refused(folder, r"shard-000001\.tar: its sha256")
    shard.write_bytes(whole)
    edit_manifest(folder, codebook_size=49)
    refused(folder, "a code is 49, expected codes below 49")
    edit_manifest(folder, codebook_size=50, num_quantizers=4)
    refused(folder, r"codes have shape .*, expected \[images, 4, 2, 4\]")
    edit_manifest(folder, num_quantizers=3, rejected=1)
    refused(folder, "says rejected 1, its shards add up to 0")
    edit_manifest(folder, rejected=0)
    (folder / "more.tar").write_bytes(whole)
    refused(folder, "more.tar: is not in dataset.json")
    (folder / "more.tar").unlink()
    shard.unlink()
    refused(folder, "shard-000001.tar: is missing")


def test_verify_counts_and_finds_repeated_keys(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a", shards=1)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    content["shards"]["shard-000000.tar"]["samples"] = 2
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    refused(folder, "holds 3 samples with 4 images, dataset.json says 2")
    folder = write_dataset(tmp_path / "b", shards=1)
    (folder / "again.tar").write_bytes((folder / "shard-000000.tar").read_bytes())
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    content["shards"]["again.tar"] = content["shards"]["shard-000000.tar"]
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    refused(folder, "occurs more than once")


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="missing; .* is not a finished"):
        DatasetManifest.load(tmp_path)
    folder = write_dataset(tmp_path / "a")
    edit_manifest(folder, format_version=2)
    refused(folder, "format version 2, this program reads 1")
    (folder / "dataset.json").write_text("{", encoding="utf-8")
    refused(folder, "not a dual-code manifest")


def test_geometry_of_the_model_is_required(tmp_path: Path) -> None:
    manifest = DatasetManifest.load(write_dataset(tmp_path))
    manifest.require(tmp_path, GEOMETRY, FINGERPRINT)
    with pytest.raises(DatasetError, match="num_quantizers 3, the model expects 8"):
        manifest.require(tmp_path, CodeGeometry(4, 8, 50))
    with pytest.raises(ValueError, match="stored as uint16"):
        CodeGeometry(4, 8, 70000)


KEPT = {
    "float16": (FeatureGeometry("float16", (5, 6), "t" * 64), np.float16),
    "bfloat16": (FeatureGeometry("bfloat16", (5, 6), "t" * 64), np.uint16),
    "pixels": (FeatureGeometry("pixels", (3, 8, 8)), np.uint8),
}


def write_features(folder: Path, kind: str, **changes: object) -> Path:
    """Samples of one, two and no images, with what is kept of them for continuous features."""
    folder.mkdir()
    geometry, dtype = KEPT[kind]
    manifest = DatasetManifest(FINGERPRINT, 50, 3, 4, image_size=8, features=geometry)
    with ShardWriter(folder / "a.tar", GEOMETRY, features=geometry) as writer:
        for images in (1, 2, 0):
            sample = make_sample(f"k{images}", images)
            noise = np.random.default_rng(images).integers(0, 200, (images, *geometry.shape))
            sample.features = noise.astype(dtype)
            writer.write(replace(sample, **changes))
    assert writer.entry is not None
    writer.entry.samples_in = writer.entry.samples
    manifest.add("a.tar", writer.entry)
    manifest.save(folder)
    return folder


@pytest.mark.parametrize("kind", KEPT)
def test_features_are_kept_beside_codes(tmp_path: Path, kind: str) -> None:
    geometry, dtype = KEPT[kind]
    folder = write_features(tmp_path / kind, kind)
    assert verify_dataset(folder).features == geometry
    for sample in iterate_shard(folder / "a.tar"):
        images = len(sample.codes)
        noise = np.random.default_rng(images).integers(0, 200, (images, *geometry.shape))
        assert sample.features is not None and sample.features.dtype == dtype
        assert np.array_equal(sample.features, noise.astype(dtype)) and sample.features.flags.writeable
        sample.features = None
        assert same(sample, make_sample(sample.key, images))


def test_data_sets_without_features_say_nothing_of_them(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "plain")
    assert "features" not in json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert DatasetManifest.load(folder).features is None


def test_features_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    expected = {kind: geometry for kind, (geometry, _) in KEPT.items()}
    folder = write_features(tmp_path / "a", "float16")
    manifest = DatasetManifest.load(folder)
    manifest.require(folder, GEOMETRY, FINGERPRINT, expected["bfloat16"])  # how exactly is not the model's
    other = FeatureGeometry("float16", (5, 6), "u" * 64)
    message = "has features 5 x 6 of the vision tower tttttttttttt for continuous features, the model expects"
    for unfit in (expected["pixels"], other, FeatureGeometry("float16", (5, 7), "t" * 64)):
        with pytest.raises(DatasetError, match=message):
            manifest.require(folder, GEOMETRY, FINGERPRINT, unfit)
    plain = write_dataset(tmp_path / "plain")
    with pytest.raises(DatasetError, match="has nothing for continuous features, the model expects pixels"):
        DatasetManifest.load(plain).require(plain, GEOMETRY, FINGERPRINT, expected["pixels"])
    with pytest.raises(ValueError, match="features are None, expected"):
        write_features(tmp_path / "b", "float16", features=None)
    with pytest.raises(ValueError, match=r"features are .*'float64'.*, expected .*'float16'"):
        write_features(tmp_path / "c", "float16", features=np.zeros((1, 5, 6)))
    with pytest.raises(ValueError, match="features are 'float8', expected one of float16, bfloat16, pixels"):
        FeatureGeometry("float8", (5, 6))
    edit_manifest(folder, features={"kind": "float16", "shape": [5, 7], "fingerprint": "t" * 64})
    with pytest.raises(DatasetError, match=r"sample 'k1': features are \(\(1, 5, 6\), 'float16'\), expected"):
        verify_dataset(folder)
