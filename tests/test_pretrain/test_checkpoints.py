"""Checkpoints are whole or absent, and the newest whole one is found."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.state import FlexState
from safetensors import SafetensorError

from data_pipeline.streams.plain_state import from_plain, to_plain
from pretrain.checkpoints.engines import engine_files, load_checkpoint
from pretrain.checkpoints.finding import (
    CheckpointError,
    complete_checkpoints,
    find_checkpoint,
    read_state,
    starter,
    writer_of,
)
from pretrain.checkpoints.fragments import FragmentReader, Fragments, read_index
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.config import ConfigError, JobConfig
from pretrain.random_state import random_state, restore_random_state
from pretrain.runtime import Runtime

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
plain_values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.just("!"), inner)
        | st.dictionaries(st.text(), inner).map(FlexState)
    ),
    max_leaves=12,
)


def runtime_at(step: int, world_size: int = 1) -> Runtime:
    device = torch.device("cpu")
    return Runtime(0, 0, world_size, device, torch.float32, 0, 1, Path("unused"), step=step)


def save(folder: Path, step: int, keep: int = 2, assets=None, started_by=None, **state) -> Path:
    runtime = runtime_at(step)
    files, engines = engine_files({}, state, runtime)
    about = {"engines": engines, "started_by": started_by}
    CheckpointWriter(folder, runtime, "toy", keep).save(files, about, assets)
    return folder / f"step_{step:08d}"


def load(path: Path) -> dict:
    return load_checkpoint(path, runtime_at(0), {}, "toy").own(0)


def config(resume: str = "auto") -> JobConfig:
    return JobConfig("toy", "unused", 1, 1, 1, resume=resume)


def find(folder: Path, resume: str = "auto", said: list[str] | None = None) -> Path | None:
    lines = [] if said is None else said
    return find_checkpoint(config(resume), folder, runtime_at(0), lines.append)


def test_newest_is_found_and_old_ones_go(tmp_path):
    assert find(tmp_path) is None
    for step in (10, 20, 30):
        saved = save(tmp_path, step, loader=step)
        assert find(tmp_path) == saved
        assert (tmp_path / "latest").read_text(encoding="utf-8") == saved.name
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000020", "step_00000030"]
    runtime = runtime_at(0)
    assert load_checkpoint(saved, runtime, {}, "toy").states == [{"loader": 30}]
    assert runtime.step == 30
    assert read_state(saved)["world_size"] == 1


def test_newest_is_the_one_written_last(tmp_path):
    save(tmp_path, 20)
    again = save(tmp_path, 10)  # a run that went back to step 5, say
    assert complete_checkpoints(tmp_path)[0] == again
    assert save(tmp_path, 10, loader="second") == again
    assert load(again) == {"loader": "second"}


@pytest.mark.parametrize("restarts", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_job_started_again_by_the_same_words_loses_no_steps(tmp_path, monkeypatch, restarts):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    of_before = save(tmp_path / "other", 10)
    again = str(of_before)
    monkeypatch.setenv(restarts, "1")
    assert find(tmp_path, again) == of_before  # no checkpoint since
    assert find(tmp_path / "none", "never") is None
    monkeypatch.setenv(restarts, "0")
    for words in (again, "never"):
        folder = tmp_path / words.replace("/", "_")
        older = save(folder, 30, started_by=starter(config("auto")))
        since = save(folder, 20, started_by=starter(config(words)))
        if words == "never":
            with pytest.raises(ConfigError, match="two runs would be mixed"):
                find(folder, words)
        else:
            assert find(folder, words) == of_before
        with monkeypatch.context() as patched:
            patched.setenv(restarts, "2")
            assert find(folder, words) == since and older.exists()
            if restarts.startswith("SLURM"):
                patched.setenv("SLURM_JOB_ID", "7")  # that of another job
            else:  # another torchrun, which began later
                patched.setattr(psutil.Process, "create_time", lambda _: time.time())
            if words == "never":
                with pytest.raises(ConfigError, match="two runs would be mixed"):
                    find(folder, words)
            else:
                assert find(folder, words) == of_before


@pytest.mark.parametrize("failing_call", [1, 2])
def test_interrupted_writing_leaves_the_previous_one(tmp_path, monkeypatch, failing_call):
    previous = save(tmp_path, 1)
    calls = []

    def replace(*paths):
        calls.append(paths)
        if len(calls) == failing_call:
            raise KeyboardInterrupt
        return os.rename(*paths)

    with monkeypatch.context() as patched:
        patched.setattr("pretrain.checkpoints.writer.os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    # Stopped before the rename there is no second one; after it the second is complete.
    expected = {1: [previous], 2: [tmp_path / "step_00000002", previous]}[failing_call]
    assert complete_checkpoints(tmp_path) == expected
    save(tmp_path, 3)
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncate", "rank_00000.json has other contents than when it was written"),
        ("byte", "rank_00000.json has other contents than when it was written"),
        ("remove", "rank_00000.json cannot be read (No such file or directory)"),
        ("state", "is incomplete and passed over"),
    ],
)
def test_damaged_checkpoint_is_passed_over(tmp_path, damage, reason):
    good, bad = save(tmp_path, 1, loader=[1.5] * 9), save(tmp_path, 2, loader=[1.5] * 9)
    file = bad / ("state.json" if damage == "state" else "rank_00000.json")
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes(flipped if damage == "byte" else content[:-10])
    said: list[str] = []
    assert find(tmp_path, said=said) == good
    assert len(said) == 1 and str(bad) in said[0] and reason in said[0] and "passed over" in said[0]
    if damage != "state":
        assert find(tmp_path) == good and not bad.exists()
        (tmp_path / ".damaged_step_00000002").rename(bad)
    expected = "folder of a complete checkpoint" if damage == "state" else "are damaged; restore one"
    with pytest.raises((ConfigError, CheckpointError), match=expected):
        find(tmp_path, str(bad))
    (good / "rank_00000.json").unlink()
    if damage != "state":
        with pytest.raises(CheckpointError, match="step_00000002, step_00000001 in .* are damaged"):
            find(tmp_path)


def test_a_full_disk_leaves_the_previous_one(tmp_path, monkeypatch):
    previous = save(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("sync", "write_text", "shutil.rmtree"):  # in the background, at the end, before the start
        with monkeypatch.context() as patched:
            patched.setattr(f"pretrain.checkpoints.writer.{place}", full)
            (tmp_path / ".writing_step_00000009").mkdir(exist_ok=True)
            with pytest.raises(CheckpointError, match="step 2 could not be .*No space left.*Make room"):
                save(tmp_path, 2)
    (tmp_path / ".writing_step_00000009").rmdir()
    said: list[str] = []
    assert find(tmp_path, said=said) == previous
    assert said == [f"{tmp_path / '.writing_step_00000002'} is incomplete and passed over"]
    assert save(tmp_path, 2).is_dir() and not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("call", ["os.replace", "os.unlink", "shutil.rmtree"])
def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch, caplog, call):
    replace = os.replace

    def stale(*places, ignore_errors=False, **__):
        if call == "os.replace" and ".removing" not in str(places[1]):
            return replace(*places)
        if not ignore_errors:
            raise OSError(errno.ESTALE, "Stale file handle")

    save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(f"pretrain.checkpoints.writer.{call}", stale)
        second = save(tmp_path, 2, keep=1)
    assert find(tmp_path) == second
    told = "an old checkpoint stays for now: [Errno 116] Stale file handle" in caplog.text
    assert told == (call == "os.replace")
    assert save(tmp_path, 3, keep=1).is_dir()
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000003"]


def test_rank_state_is_plain_text_and_comes_back(tmp_path):
    flex = FlexState(a=SliceState(index=1, current=2))
    state = {
        "loader": {
            "rng": b"\x00\xff",
            3: (1, None, "x"),
            "nested": [flex, {"!": 1}],
        },
        "random": random_state(),
        "tensor": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "small": 5e-324,
    }
    saved = save(tmp_path, 1, **state)
    json.loads((saved / "rank_00000.json").read_text(encoding="utf-8"))
    back = load(saved)
    assert back["loader"] == state["loader"] and type(back["loader"]["nested"][0]) is FlexState
    assert torch.equal(back["tensor"], state["tensor"]) and back["small"] == 5e-324
    assert back["random"]["python"] == state["random"]["python"]
    np.testing.assert_array_equal(back["random"]["numpy"][1], state["random"]["numpy"][1])
    with pytest.raises(TypeError, match="a state holds a pathlib.PosixPath"):
        save(tmp_path, 2, path=tmp_path)


@given(plain_values)
def test_plain_state_is_exact(value):
    back = from_plain(json.loads(json.dumps(to_plain(value))))
    assert repr(back) == repr(value)


def test_files_of_ranks_are_told_by_their_names():
    names = {
        "rank_00003.json": 3,
        "rank_00004.safetensors": 4,
        "model/rank_00012.safetensors": 12,
        "model/shared.safetensors": 0,
        "assets/config.json": 0,
    }
    assert {name: writer_of(name) for name in names} == names


def test_format_of_another_version(tmp_path):
    saved = save(tmp_path, 1)
    state = read_state(saved)
    (saved / "state.json").write_text(json.dumps({**state, "format_version": 1}), encoding="utf-8")
    with pytest.raises(ConfigError, match="has format version 1, this program reads 3"):
        load_checkpoint(saved, runtime_at(0), {}, "toy")


def test_resume_never_and_by_path(tmp_path):
    assert find(tmp_path, "never") is None
    first = save(tmp_path, 1)
    save(tmp_path, 2)
    assert find(tmp_path, str(first)) == first
    with pytest.raises(ConfigError, match="resume=never, but .* holds step_00000002"):
        find(tmp_path, "never")


def test_checkpoint_of_another_run(tmp_path):
    saved = save(tmp_path, 1)
    with pytest.raises(ConfigError, match="was written by job toy .*; expected job mllm"):
        load_checkpoint(saved, runtime_at(0), {}, "mllm")
    with pytest.raises(ConfigError, match="engines none; expected job toy with generator"):
        load_checkpoint(saved, runtime_at(0), {"generator": None}, "toy")
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        load_checkpoint(tmp_path, runtime_at(0), {}, "toy")


def test_random_state_comes_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    state = random_state()
    first = draw()
    assert draw() != first
    restore_random_state(state)
    assert draw() == first


def test_writing_time_orders_checkpoints(tmp_path):
    before = time.time()
    assert before <= read_state(save(tmp_path, 1))["written"] <= time.time()


def test_training_goes_on_while_files_are_written(tmp_path, monkeypatch):
    previous = save(tmp_path, 1)
    goes_on = threading.Event()
    monkeypatch.setattr(Fragments, "write", lambda self, path: goes_on.wait(60) and path.write_bytes(b"done"))
    writer = CheckpointWriter(tmp_path, runtime_at(2), "toy", 2)
    assert not writer.pending and writer.finish() is None
    files = {"rank_00000.json": "{}", "model/rank_00000.safetensors": Fragments({}, {})}
    writer.save(files, {"engines": {}}, background=True)
    assert writer.pending and writer.busy
    assert complete_checkpoints(tmp_path) == [previous]
    goes_on.set()
    final = writer.finish()
    assert not writer.pending and complete_checkpoints(tmp_path) == [final, previous]
    assert (tmp_path / "latest").read_text(encoding="utf-8") == final.name == "step_00000002"
    assert read_state(final)["files"].keys() == files.keys()


def test_failure_in_the_background_is_told(tmp_path, monkeypatch):
    previous = save(tmp_path, 1)

    def short_write(*_):
        raise SafetensorError("I/O error: No space left on device")

    writer = CheckpointWriter(tmp_path, runtime_at(2), "toy", 2)
    monkeypatch.setattr(Fragments, "write", short_write)
    writer.save({"model/rank_00000.safetensors": Fragments({}, {})}, {"engines": {}}, background=True)
    with pytest.raises(CheckpointError, match=r"step 2 could not be .*\(rank 0: I/O error: No space left"):
        writer.finish()
    assert complete_checkpoints(tmp_path) == [previous] and not writer.pending


def test_really_full_disk(tmp_path):
    """A file system of 1 MiB, in a mount namespace of its own."""
    code = (
        "import sys; from pathlib import Path; from tests.test_pretrain.test_checkpoints import save, find\n"
        "folder = Path(sys.argv[1]); first = save(folder, 1)\n"
        "try: save(folder, 2, big=bytes(2_000_000))\n"
        "except OSError as error: print(type(error).__name__, error)\n"
        "assert find(folder) == first and save(folder, 3) == folder / 'step_00000003'"
    )
    mounted = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    words = ["sh", "-c", mounted, "sh", str(tmp_path), sys.executable, code]
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a mount namespace (unshare --mount)")
    done = subprocess.run([*unshare, *words], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert re.match(
        r"CheckpointError .*step 2 could not be written .*No space left on device.*Make room", done.stdout
    )


def test_assets_are_part_of_a_checkpoint(tmp_path):
    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")

    saved = save(tmp_path, 1, assets=write)
    assert "assets/config.json" in read_state(saved)["files"]
    (saved / "assets" / "config.json").write_text("{ }", encoding="utf-8")
    with pytest.raises(CheckpointError, match="are damaged"):
        find(tmp_path)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_any_stretch_of_a_tensor_is_read_from_its_pieces(sizes, data):
    whole = torch.randn(sum(sizes))
    with tempfile.TemporaryDirectory() as place:
        folder, start = Path(place), 0
        for number, size in enumerate(sizes):
            doubled = min(len(whole), start + size + data.draw(st.integers(0, 2)))  # some is there twice
            Fragments({"weight/a": whole[start:doubled].clone()}, {"weight/a": start}).write(
                folder / f"{number}"
            )
            start += size
        reader = FragmentReader(folder, read_index(folder, [str(n) for n in range(len(sizes))]))
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
        assert torch.equal(reader.read("weight/a", first, last), whole[first:last])
        with pytest.raises(
            ValueError, match=f"lacks a part of weight/a: expected 0 to {len(whole) + 1}, got"
        ):
            reader.read("weight/a", 0, len(whole) + 1)
        with pytest.raises(ValueError, match="lacks a part of weight/b: expected 0 to 1, got nothing of it"):
            reader.read("weight/b", 0, 1)
