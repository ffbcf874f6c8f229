"""Checkpoints are whole or absent, and the newest whole one is found."""

import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain.checkpointing import (
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    random_state,
    read_state,
    restore_random_state,
    save_checkpoint,
)
from pretrain.config import ConfigError, JobConfig
from pretrain.runtime import Runtime


def runtime_at(step: int, world_size: int = 1) -> Runtime:
    device = torch.device("cpu")
    return Runtime(0, 0, world_size, device, torch.float32, 0, 1, Path("unused"), step=step)


def save(folder: Path, step: int, keep: int = 2, **state) -> Path:
    return save_checkpoint(folder, runtime_at(step), {}, state, "toy", keep)


def config(resume: str = "auto") -> JobConfig:
    return JobConfig("toy", "unused", 1, 1, 1, resume=resume)


def test_newest_is_found_and_old_ones_go(tmp_path):
    assert find_checkpoint(config(), tmp_path) is None
    for step in (10, 20, 30):
        saved = save(tmp_path, step, loader=step)
        assert find_checkpoint(config(), tmp_path) == saved
        assert (tmp_path / "latest").read_text(encoding="utf-8") == saved.name
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000020", "step_00000030"]
    runtime = runtime_at(0)
    assert load_checkpoint(saved, runtime, {}, "toy") == {"loader": 30}
    assert runtime.step == 30
    assert read_state(saved)["world_size"] == 1


def test_newest_is_the_one_written_last(tmp_path):
    save(tmp_path, 20)
    again = save(tmp_path, 10)  # a run that went back to step 5, say
    assert complete_checkpoints(tmp_path)[0] == again
    assert save(tmp_path, 10, loader="second") == again
    assert load_checkpoint(again, runtime_at(0), {}, "toy") == {"loader": "second"}


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
        patched.setattr("pretrain.checkpointing.os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    # Stopped before the rename there is no second one; after it the second is complete.
    expected = {1: [previous], 2: [tmp_path / "step_00000002", previous]}[failing_call]
    assert complete_checkpoints(tmp_path) == expected
    save(tmp_path, 3)
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("damage", ["truncate", "remove", "state"])
def test_damaged_checkpoint_is_passed_over(tmp_path, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    file = bad / ("state.json" if damage == "state" else "rank_00000.pt")
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    assert find_checkpoint(config(), tmp_path) == good
    with pytest.raises(ConfigError, match="expected auto, never or the folder of a complete checkpoint"):
        find_checkpoint(config(str(bad)), tmp_path)


def test_resume_never_and_by_path(tmp_path):
    assert find_checkpoint(config("never"), tmp_path) is None
    first = save(tmp_path, 1)
    save(tmp_path, 2)
    assert find_checkpoint(config(str(first)), tmp_path) == first
    with pytest.raises(ConfigError, match="resume=never, but .* holds step_00000002"):
        find_checkpoint(config("never"), tmp_path)


def test_checkpoint_of_another_run(tmp_path):
    saved = save(tmp_path, 1)
    with pytest.raises(ConfigError, match="was written by job toy .*; expected job mllm"):
        load_checkpoint(saved, runtime_at(0), {}, "mllm")
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2, bfloat16_enabled=lambda: False)
    with pytest.raises(ConfigError, match=r"engines none; expected job toy with generator \(ZeRO-2, fp32\)"):
        load_checkpoint(saved, runtime_at(0), {"generator": engine}, "toy")
    message = r"written by 1 rank\(s\) and this run has 2: .*ds_to_universal"
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(saved, runtime_at(0, world_size=2), {}, "toy")
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
