"""A run that is killed, stopped and robbed of its newest checkpoint, again and again, ends as undisturbed."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoints.finding import complete_checkpoints
from tests.support.distributed import Ranks, run_module
from tests.support.measured import is_measured
from tests.test_pretrain.test_jobs import (  # noqa: F401  # the fixtures
    codes,
    folder,
    mllm_words,
    tokenizer_run,
    tokenizer_words,
)

pytestmark = pytest.mark.slow
DISTURBANCES = 15  # of each job
MORE = [
    "steps=75",
    "checkpoint_every=2",
    "keep_checkpoints=3",
    "optimizer.warmup_steps=5",
    "validate_every=30",
]


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps = [int(line.split(",")[0].split(":")[1]) for line in lines if line.startswith('{"step": ')]
    return max(steps, default=0)


def disturb(run: Path, words: list[str], how: str, draw: random.Random) -> str:
    """Start the run and end it in the middle; returns what rank 0 said."""
    with Ranks("pretrain.train", words) as ranks:
        deadline = time.monotonic() + 300
        before, steps = last_step(run), draw.randint(1, 4)
        # Half of the kills come while a checkpoint is being written, if that is met.
        in_writing = how == "kill" and draw.random() < 0.5
        while last_step(run) < before + steps or "loss" not in ranks.output_of(0):
            assert time.monotonic() < deadline, ranks.output_of(0)
            assert not (run / "done.json").exists(), "the run was over before it could be disturbed"
            if in_writing and list((run / "checkpoints").glob(".writing_*")) and last_step(run) > before:
                break
            time.sleep(0.002)
        victims = draw.choice([[0, 1], [0], [1]])
        for rank in victims:
            ranks.processes[rank].send_signal(signal.SIGTERM if how == "stop" else signal.SIGKILL)
        finished = ranks.wait()
        if how == "stop":
            assert finished.returncodes == [0, 0], finished.output[-3000:]
            assert "checkpoint written" in finished.outputs[0]
        else:
            assert any(finished.returncodes)
    assert not (run / "done.json").exists()
    return finished.outputs[0]


def damage_newest(run: Path, draw: random.Random) -> Path:
    """Flip a byte of the newest checkpoint, cut a file of it off, or remove one."""
    newest = complete_checkpoints(run / "checkpoints")[0]
    file = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    content, place = file.read_bytes(), draw.random()
    at = int(place * len(content))
    what = draw.choice(["byte", "cut", "remove"])
    if what == "remove":
        file.unlink()
    else:
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        file.write_bytes(flipped if what == "byte" else content[:at])
    return newest


def rejected_keys(run: Path) -> set[str]:
    """Keys of the pictures that could not be read."""
    path = run / "rejected.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {json.loads(line)["key"] for line in lines}


def figures(run: Path) -> list[dict]:
    """All lines of metrics.jsonl, without what another start changes."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    # Warnings are counted since the start.
    return [{k: v for k, v in r.items() if not (is_measured(k) or "warnings" in k)} for r in records]


def soak(whole: Path, disturbed: Path, words, seed: int) -> None:
    """Run once undisturbed and once disturbed; compare what is left."""
    run_module("pretrain.train", [*words(whole.name), *MORE], timeout=900).check()
    draw = random.Random(seed)
    arguments = [*words(disturbed.name), *MORE]
    ways = [("kill", "stop", "damage")[number % 3] for number in range(DISTURBANCES)]
    draw.shuffle(ways)
    ways = ["stop", "stop", *ways]  # there has to be one before the first that is damaged
    damaged: Path | None = None
    for way in ways:
        said = disturb(disturbed, arguments, "kill" if way == "kill" else "stop", draw)
        if damaged is not None:
            assert f"{damaged} is " in said and "passed over" in said, (damaged, said)
        damaged = damage_newest(disturbed, draw) if way == "damage" else None
    run_module("pretrain.train", arguments, timeout=900).check()
    assert figures(disturbed) == figures(whole)
    found, expected = (load_file(run / "export" / "model.safetensors") for run in (disturbed, whole))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert [path.name for path in complete_checkpoints(disturbed / "checkpoints")][0] == "step_00000075"
    assert rejected_keys(disturbed) == rejected_keys(whole)


def test_the_tokenizer_survives(folder):  # noqa: F811
    soak(folder / "whole", folder / "disturbed", lambda run: tokenizer_words(folder, run, 2), seed=0)


def test_the_unified_model_survives(folder, codes):  # noqa: F811
    soak(folder / "mllm_whole", folder / "mllm_disturbed", lambda run: mllm_words(folder, run, 2), seed=1)
