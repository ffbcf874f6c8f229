"""What a run says of its speed: rates, MFU, memory, time by part, and traces of chosen steps."""

import gzip
import json

import pytest
import torch

from pretrain.config import ConfigError, load_job_config
from pretrain.gpus import peak_flops
from pretrain.metrics import COLUMNS
from pretrain.timing import PARTS, StepClock
from tests.support.distributed import run_module
from tests.support.toy_words import TOY_WORDS

SETTINGS = ["steps=6", "log_every=3", "two_engines=true", "validate_every=3", "profile.steps=3..4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A toy on two ranks: what it printed, its log lines, and its folder."""
    folder = tmp_path_factory.mktemp("seen")
    arguments = [*TOY_WORDS, *SETTINGS, "peak_tflops=0.001", "sleep_per_step=0.01", f"run_dir={folder}"]
    finished = run_module("pretrain.train", arguments).check()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return finished.outputs[0], [record for record in records if record["split"] == "train"], folder


def test_times_by_part_add_up_to_the_step(run):
    for record in run[1]:
        parts = {part: record[f"seconds/{part}"] for part in (*PARTS, "rest")}
        assert all(seconds >= 0 for seconds in parts.values()), parts
        assert min(parts["forward"], parts["backward"], parts["optimizer"]) > 0
        assert parts["rest"] > 0.01  # where the toy sleeps
        # The step is the first rank's, the parts are means over ranks: longer where one waits for a core.
        mean_over_ranks = sum(parts.values())
        assert 0.8 < mean_over_ranks / record["seconds_per_step"] < 3


def test_mfu_is_what_the_ranks_compute_of_what_they_could(run):
    for record in run[1]:
        tflops = record["samples_per_second"] * 1e6 / 2 / 1e12  # a million a sample, two ranks
        assert record["tflops_per_rank"] == pytest.approx(tflops, rel=1e-6)
        assert record["mfu"] == pytest.approx(tflops / 0.001, rel=1e-6)
        assert 0.05 < record["memory/resident_gib"] <= record["memory/peak_gib"] + 0.01


def test_printed_lines_fit(run):
    lines = [line for line in run[0].splitlines() if line.startswith(("train ", "val "))]
    assert len(lines) == 4 and max(map(len, lines)) <= COLUMNS
    assert all(word in lines[0] for word in ("s/step", "samples/s", "mfu", "loss/model"))
    assert "seconds/" not in run[0] and "memory/" not in run[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_trace_holds_readable_ranges(run, rank):
    file = run[2] / "traces" / f"steps_3_to_4_rank_{rank}.json.gz"
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        events = json.load(opened)["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    counts = {name: sum(e["name"] == name for e in ranges) for name in {e["name"] for e in ranges}}
    assert counts["step 3"] == counts["step 4"] == 1 and "step 5" not in counts
    # Two steps of two micro-batches and two engines.
    assert [counts[part] for part in PARTS] == [2, 8, 8, 2, 2] and counts["validation"] == 1
    forward = [e for e in ranges if e["name"] == "forward"]
    for name in ("model/first", "second/last"):
        layers = [e for e in ranges if e["name"] == name and any(within(e, f) for f in forward)]
        assert len(layers) == 4


def within(inner, outer) -> bool:
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile.steps=13..10"], "profile.steps=13..10: expected a step from 1 on, or the first and the"),
        (["profile.steps=0..2"], "profile.steps=0..2: expected a step from 1 on"),
        (["profile.steps=soon"], "profile.steps=soon: expected a step from 1 on"),
        (["profile.steps=5..7"], "profile.steps=5..7: expected steps of this run, which has 6"),
        (["profile.step=5"], "step"),
        (["peak_tflops=-1"], "peak_tflops=-1.0: expected 0 or more"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ConfigError, match=message.replace(".", "[.]")):
        load_job_config([*TOY_WORDS, "run_dir=unused", *words])


def test_one_step_is_a_range():
    config = load_job_config([*TOY_WORDS, "run_dir=unused", "profile.steps=6"])
    assert config.profile.bounds() == (6, 6)


class FakeEvent:
    """A CUDA event on a device that is as far as `reached`; one that is waited for moves it on."""

    recorded, reached, waits = 0, 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.recorded += 1
        self.place = FakeEvent.recorded

    def query(self) -> bool:
        return self.place <= FakeEvent.reached

    def synchronize(self) -> None:
        FakeEvent.reached = max(FakeEvent.reached, self.place)
        FakeEvent.waits += 1

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.query(), "an event was read before the device had passed it"
        return 1000.0 * (end.place - self.place)


def test_events_are_read_late(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = StepClock(torch.device("cuda"))
    for part in ("data", "forward", "forward"):
        with clock.part(part):
            pass
    FakeEvent.reached = 4
    clock.collect()
    assert FakeEvent.waits == 0 and len(clock._spans) == 1
    with clock.outside("validation"), clock.part("forward"):
        pass
    expected = dict.fromkeys(PARTS, 0.0) | {"data": 1.0, "forward": 2.0}
    assert clock.pop() == expected and FakeEvent.waits == 1
    assert clock.pop() == dict.fromkeys(PARTS, 0.0) and FakeEvent.waits == 1


def test_peaks_are_those_of_the_very_card():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) is None
