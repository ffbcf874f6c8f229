"""Image streams: every sample, exact resume, the same order on another split, one-line refusals."""

import io
import json
import os
import resource
import tarfile
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.structs import ShardInfo
from megatron.energon.savable_loader import SavableDatasetCheckpoint

from data_pipeline.pretokenize.plan import count_shard
from data_pipeline.shards.reader import PreparedShards
from data_pipeline.streams import (
    DatasetError,
    ImageFolder,
    ImageStreamConfig,
    image_loader,
    prepare_dataset,
)
from data_pipeline.streams.reader import worker_config
from tests.support.distributed import run_code


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def captions(index: int) -> bytes:
    return json.dumps({"captions": {"en": f"thing {index}", "de": f"Ding {index}"}}).encode()


def write_image_shards(folder: Path, shards: int = 2, per_shard: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = []
        for index in range(shard * per_shard, (shard + 1) * per_shard):
            members.append((f"k{index:04d}.png", b"picture %d" % index))
            members.append((f"k{index:04d}.json", captions(index)))
        write_tar(folder / f"shard-{shard:06d}.tar", members)
    prepare_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_shards(tmp_path_factory.mktemp("images"))


def config(path: Path, **changes: object) -> ImageStreamConfig:
    return ImageStreamConfig(path=str(path), shuffle_buffer_size=8, slice_length=5, **changes)


def keys(loader, count: int) -> list[list[str]]:
    return [next(loader).keys for _ in range(count)]


def test_batches_hold_bytes_and_captions_of_their_keys(images: Path) -> None:
    batch = next(image_loader(config(images), micro_batch_size=4))
    assert len(batch) == 4
    rows = zip(batch.keys, batch.image_bytes, batch.captions, batch.shards, strict=True)
    for key, data, text, shard in rows:
        index = int(key[1:])
        assert Path(shard).name == f"shard-{index // 20:06d}.tar"
        assert data == b"picture %d" % index
        assert text == {"en": f"thing {index}", "de": f"Ding {index}"}


def test_validation_pass_covers_each_sample_once_over_ranks(images: Path) -> None:
    loaders = [image_loader(config(images), 3, rank, 3, split="val") for rank in range(3)]
    passes = [[key for loader in loaders for batch in loader for key in batch.keys] for _ in range(2)]
    assert sorted(passes[0]) == [f"k{index:04d}" for index in range(40)]
    assert passes[0] == passes[1]


def test_training_epoch_covers_each_sample_and_shuffles(images: Path) -> None:
    loader = image_loader(config(images), 4)
    seen = [key for batch in keys(loader, 30) for key in batch]
    assert set(seen) == {f"k{index:04d}" for index in range(40)}
    assert max(seen.count(key) for key in set(seen)) <= 4  # three epochs and the start of a fourth
    assert seen[:40] != sorted(seen[:40])
    assert keys(image_loader(config(images), 4, seed=1), 5) != keys(image_loader(config(images), 4), 5)


@pytest.fixture(scope="module")
def blend(images: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageStreamConfig:
    """Three in four of the pictures from 12, one from 40."""
    other = tmp_path_factory.mktemp("other")
    members = [(f"other{index:02d}.png", b"other %d" % index) for index in range(12)]
    write_tar(other / "shard-000000.tar", members)
    prepare_dataset(other)
    folders = [ImageFolder(str(images), 1.0), ImageFolder(str(other), 3.0), ImageFolder("nowhere", 0.0)]
    return ImageStreamConfig(blend=folders, shuffle_buffer_size=8, slice_length=5)


def test_blend_draws_by_weight(blend: ImageStreamConfig) -> None:
    loaders = [image_loader(blend, 8, rank, 2) for rank in range(2)]
    seen = [key for loader in loaders for batch in keys(loader, 50) for key in batch]
    share = sum(key.startswith("other") for key in seen) / len(seen)
    assert abs(share - 0.75) < 0.08  # five standard deviations of 800 draws
    assert len(set(seen)) == 52


def test_a_folder_of_fewer_pictures_than_readers_has_its_share(images: Path, tmp_path: Path) -> None:
    """Divided, only 5 of 30 readers would draw any of it."""
    write_tar(tmp_path / "a.tar", [(f"few{index}.png", b"1") for index in range(5)])
    prepare_dataset(tmp_path)
    folders = [ImageFolder(str(images), 1.0), ImageFolder(str(tmp_path), 1.0)]
    few = ImageStreamConfig(blend=folders, shuffle_buffer_size=0)
    loaders = [image_loader(few, 4, rank, 30) for rank in range(30)]
    seen = [key for loader in loaders for batch in keys(loader, 10) for key in batch]
    share = Counter(key for key in seen if key.startswith("few"))
    assert abs(share.total() / len(seen) - 0.5) < 0.08  # more than five standard deviations of 1200 draws
    assert len(share) == 5 and max(share.values()) < 1.3 * min(share.values())
    first = {next(key for batch in keys(it, 10) for key in batch if key.startswith("few")) for it in loaders}
    assert len(first) == 5  # each reader in an order of its own
    validation = [image_loader(few, 4, rank, 30, split="val") for rank in range(30)]
    assert sorted(key for loader in validation for batch in loader for key in batch.keys)[:5] == [
        f"few{index}" for index in range(5)
    ]
    assert len({key for loader in validation for batch in loader for key in batch.keys}) == 45


def test_a_blend_of_many_folders_may_open_their_shards(tmp_path: Path) -> None:
    """Each keeps some open; the usual limit is 1024."""
    folders = []
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        folder.mkdir()
        for shard in range(20):
            write_tar(folder / f"{shard:02d}.tar", [(f"{folder.name}{shard:02d}.png", b"1")])
        prepare_dataset(folder)
        folders.append(ImageFolder(str(folder)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        loader = image_loader(ImageStreamConfig(blend=folders, on_bad_sample="stop"), 4)
        assert len({key for batch in keys(loader, 100) for key in batch}) == 60
        loader.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_samples_that_are_excluded_from_the_split_are_not_read(tmp_path: Path) -> None:
    """Energon's `exclude` names shards and single samples."""
    folder = write_image_shards(tmp_path / "images", shards=3, per_shard=4)
    split = folder / ".nv-meta" / "split.yaml"
    text = split.read_text(encoding="utf-8")
    excluded = "exclude: [shard-000001.tar, 'shard-000002.tar/k00{08,10}']"
    split.write_text(text.replace("exclude: []", excluded), encoding="utf-8")
    expected = {"k0000", "k0001", "k0002", "k0003", "k0009", "k0011"}
    for split_name in ("val", "train"):
        loader = image_loader(config(folder), 2, split=split_name)
        assert {key for batch in islice(loader, 9) for key in batch.keys} == expected


def test_blend_is_read_whole_in_a_validation_pass_and_resumes_exactly(blend: ImageStreamConfig) -> None:
    loaders = [image_loader(blend, 3, rank, 2, split="val") for rank in range(2)]
    assert len({key for loader in loaders for batch in loader for key in batch.keys}) == 52
    assert loaders[0].samples == 52
    loader = image_loader(blend, 3, 1, 2)
    keys(loader, 7)
    state = json.loads(json.dumps(loader.save_state()))
    expected = keys(loader, 12)
    loader.restore_states([state])
    assert keys(loader, 12) == expected


def test_path_takes_the_place_of_a_blend(images: Path) -> None:
    """As where a recipe has a blend and the command line another folder."""
    replaced = ImageStreamConfig(path=str(images), blend=[ImageFolder("nowhere")])
    assert image_loader(replaced, 4).samples == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no pictures are given; expected path=FOLDER, or blend"),
        ({"blend": [ImageFolder("", 1.0)]}, "an entry of the blend has no path"),
        ({"blend": [ImageFolder("b", -1.0)]}, "b: weight is -1.0, expected 0 or more"),
        ({"blend": [ImageFolder("b", 0.0)]}, "every weight of the blend is 0"),
    ],
)
def test_folders_that_cannot_be_used(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_loader(ImageStreamConfig(**settings), 4)


RESUME = """
import pickle, sys
from data_pipeline.streams import ImageStreamConfig, image_loader
config, state = pickle.load(sys.stdin.buffer)
loader = image_loader(config, 3, 1, 2)
loader.restore_states([state])
sys.stdout.write(repr([next(loader).keys for _ in range(12)]))
"""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_restored_state_gives_the_same_batches(images: Path, num_workers: int) -> None:
    settings = config(images, num_workers=num_workers)
    loader = image_loader(settings, 3, 1, 2)
    keys(loader, 7)
    state = loader.save_state()
    expected = keys(loader, 12)
    loader.restore_states([state])
    assert keys(loader, 12) == expected
    loader.close()
    if num_workers:
        assert run_code(RESUME, (settings, state)).decode() == repr(expected)


@pytest.mark.parametrize("kept_after", [0.0, 60.0])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_state_before_what_was_taken_ahead(
    images: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, kept_after: float
) -> None:
    """From a state that a reader kept, of just before or of its beginning, it reads on to the place."""
    monkeypatch.setattr("data_pipeline.streams.reader._KEEP_SECONDS", kept_after)
    settings = config(images, num_workers=num_workers)
    loader = image_loader(settings, 3, 1, 2)
    seen = keys(loader, 9)
    states = [loader.save_earlier_state(unused) for unused in (0, 1, 2, 9)]
    assert states[0] == loader.save_state()
    seen += keys(loader, 3)
    for state, used in zip(states, (9, 8, 7, 0), strict=True):
        loader.restore_states([json.loads(json.dumps(state))])
        assert keys(loader, 12 - used) == seen[used:]
    loader.close()


def test_a_state_while_processes_only_start(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep none until they read: the place is that from which they were started."""
    other, loader = (image_loader(config(images, num_workers=1), 3) for _ in range(2))
    expected = keys(other, 4)
    loader._open()
    for reader in loader._readers.values():
        nothing_yet = [SavableDatasetCheckpoint(state=None, offset=0)]
        monkeypatch.setattr(reader._loader, "_worker_command", lambda *_, found=nothing_yet: found)
    state = loader.save_state()
    monkeypatch.undo()
    loader.restore_states([json.loads(json.dumps(state))])
    assert keys(loader, 4) == expected
    other.close()
    loader.close()


def test_two_workers_read_what_two_ranks_read(images: Path) -> None:
    one_rank = image_loader(config(images, num_workers=2), 2)
    expected = keys(one_rank, 12)
    one_rank.close()
    for num_workers in (0, 1):
        ranks = [image_loader(config(images, num_workers=num_workers), 2, rank, 2) for rank in range(2)]
        assert [next(ranks[step % 2]).keys for step in range(12)] == expected
        for loader in ranks:
            loader.close()


@pytest.mark.parametrize("world_size", [128, pytest.param(1024, marks=pytest.mark.slow)])
def test_many_ranks_divide_many_shards(world_size: int) -> None:
    shards = [
        ShardInfo(name=f"{index}.tar", path=EPath("/nowhere"), count=500 + index * 7919 % 1000)
        for index in range(10_000)
    ]
    sizes, end = [], 0
    for rank in range(world_size):
        workers = worker_config(rank, world_size, num_workers=4, seed=0)
        for offsets in PreparedShards.shard_workers(shards, workers, max_samples_per_sequence=100):
            assert offsets[0] == end  # nothing left out, nothing twice
            end = offsets[-1]
            sizes.append(offsets[-1] - offsets[0])
    assert len(sizes) == 4 * world_size and end == sum(shard.count for shard in shards)
    assert max(sizes) < 1.01 * min(sizes)


def test_state_of_another_setting_is_refused(images: Path) -> None:
    state = image_loader(config(images), 3).save_state()
    with pytest.raises(ValueError, match="with seed=0, this loader has seed=4; resume with the same data"):
        image_loader(config(images), 3, seed=4).restore_states([state])
    with pytest.raises(ValueError, match="no state"):
        image_loader(config(images), 3, split="val").save_state()


def test_several_pictures_and_plain_captions(tmp_path: Path) -> None:
    members = [
        ("a.0.jpg", b"first"),
        ("a.1.jpg", b"second"),
        ("a.txt", b"two of them\n"),
        ("b.webp", b"third"),
    ]
    write_tar(tmp_path / "shard.tar", members)
    prepare_dataset(tmp_path)
    batch = next(image_loader(config(tmp_path, default_language="fr"), 3, split="val"))
    assert batch.keys == ["a.0", "a.1", "b"]
    assert batch.image_bytes == [b"first", b"second", b"third"]
    assert batch.captions == [{"fr": "two of them"}, {"fr": "two of them"}, {}]


def test_bad_sample_stops_or_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [("a.png", b"1"), ("a.json", captions(1)), ("b.png", b"2"), ("b.json", b"{"), ("c.png", b"3")]
    write_tar(tmp_path / "shard.tar", members)
    prepare_dataset(tmp_path)
    for num_workers in (0, 1):
        settings = config(tmp_path, on_bad_sample="stop", num_workers=num_workers)
        loader = image_loader(settings, 1, split="val")
        with pytest.raises(DatasetError, match=r"shard\.tar: sample 'b': caption cannot be read") as caught:
            list(loader)
        loader.close()
        assert "\n" not in str(caught.value)
    kept = [key for batch in image_loader(config(tmp_path), 1, split="val") for key in batch.keys]
    assert kept == ["a", "c"]
    assert "skipped" in caplog.text and "'b'" in caplog.text
    settings = config(tmp_path, require_captions=True)
    assert [key for batch in image_loader(settings, 1, split="val") for key in batch.keys] == ["a"]


def test_prepare_is_repeatable_and_refuses_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no .tar shard"):
        prepare_dataset(tmp_path)
    write_tar(tmp_path / "a.tar", [("k.png", b"1")])
    assert prepare_dataset(tmp_path) == 1
    before = (tmp_path / ".nv-meta" / "index.uuid").read_text(encoding="utf-8")
    assert prepare_dataset(tmp_path) == 1
    assert (tmp_path / ".nv-meta" / "index.uuid").read_text(encoding="utf-8") == before
    write_tar(tmp_path / "b.tar", [("l.png", b"1"), ("m.png", b"2")])
    assert prepare_dataset(tmp_path) == 3
    write_tar(tmp_path / "c.tar", [("l.png", b"1")])
    with pytest.raises(DatasetError, match="key l occurs more than once"):
        prepare_dataset(tmp_path)
    (tmp_path / "c.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:700])
    with pytest.raises(DatasetError, match=r"c\.tar.*(truncated|damaged)"):
        prepare_dataset(tmp_path)


def requests_to_read() -> int:
    """How often this process has asked the kernel for a part of a file."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(found["syscr"])


def test_shards_are_indexed_and_counted_with_few_requests(tmp_path: Path) -> None:
    """On a network file system one for each sample is hours for some million of them."""
    members = [(f"k{index:04d}.{part}", b"1" * 9000) for index in range(1000) for part in ("jpg", "json")]
    write_tar(tmp_path / "a.tar", members)
    for read in (partial(prepare_dataset, tmp_path), partial(count_shard, str(tmp_path / "a.tar"))):
        before = requests_to_read()
        read()
        assert requests_to_read() - before < 200


def test_damaged_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        image_loader(config(tmp_path / "nowhere"), 1)
    write_tar(tmp_path / "a.tar", [("k.png", b"1" * 5000), ("l.png", b"2" * 5000)])
    with pytest.raises(DatasetError, match="index .* is missing.*energon prepare"):
        image_loader(config(tmp_path), 1)
    prepare_dataset(tmp_path)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:6000])
    with pytest.raises(DatasetError, match=r"a\.tar: truncated"):
        image_loader(config(tmp_path), 1)
    with pytest.raises(DatasetError, match=r"a\.tar: sample 1 cannot be read: truncated"):
        # Rank 0 looks at all shards for all ranks.
        list(image_loader(config(tmp_path, on_bad_sample="stop"), 1, 1, 2, split="val"))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DatasetError, match=r"a\.tar: named in the index but missing"):
        image_loader(config(tmp_path), 1)


@pytest.mark.parametrize("on_bad_sample", ["stop", "skip"])
def test_shards_without_pictures_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_bad_sample: str
) -> None:
    """Codes in place of pictures, say, would be read for ever."""
    monkeypatch.setattr("data_pipeline.streams.images._MOST_WITHOUT_A_PICTURE", 30)
    write_tar(tmp_path / "a.tar", [(f"k{index}.codes.npy", b"codes") for index in range(20)])
    prepare_dataset(tmp_path)
    message = (
        r"a\.tar: sample 'k\d+': 30 samples in a row without a picture, the last of \['codes\.npy'\]; ex"
    )
    with pytest.raises(DatasetError, match=message) as caught:
        next(image_loader(config(tmp_path, on_bad_sample=on_bad_sample), 4))
    assert "\n" not in str(caught.value)
    members = [
        (f"k{index:03d}.png" if index % 25 == 0 else f"k{index:03d}.txt", b"1") for index in range(100)
    ]
    write_tar(tmp_path / "a.tar", members)
    prepare_dataset(tmp_path)
    found = image_loader(config(tmp_path, on_bad_sample=on_bad_sample), 1, split="val")
    assert [key for batch in found for key in batch.keys] == ["k000", "k025", "k050", "k075"]
