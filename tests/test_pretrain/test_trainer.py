"""The loop under DeepSpeed with real ranks: ranks agree, resumes are exact, bad gradients stop it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pretrain.config import JobConfig, WandbConfig
from pretrain.metrics import MetricsLog, console_line
from pretrain.runtime import free_port
from tests.support.distributed import Ranks, run_function
from tests.support.measured import is_measured
from tests.support.toy_words import TOY_WORDS

TOY = [
    *TOY_WORDS,
    "optimizer.lr=0.01",
    "optimizer.warmup_steps=2",
    "optimizer.weight_decay=0.1",
]
EXACT = ["noise=true", "two_engines=true", "validate_every=2"]
PLAIN = ["two_engines=true", "second_optimizer={lr: 0.01, warmup_steps: 2, weight_decay: 0.1}"]
# Under it a tiny model would stay whole on every rank, and ZeRO-3 would not be exercised.
SHARD_EVERYTHING = {"stage3_param_persistence_threshold": 0}


def toy_arguments(folder: Path, level: str, *more: str) -> list[str]:
    """Command line of a toy run in `folder`, at the ZeRO level of a file in ds_configs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads((Path("ds_configs") / f"{level}.json").read_text(encoding="utf-8"))
    settings["zero_optimization"] |= SHARD_EVERYTHING if level.startswith("zero3") else {}
    # Both ranks come here: neither may read what the other has half written.
    temporary = folder / f"deepspeed.{os.getpid()}"
    temporary.write_text(json.dumps(settings), encoding="utf-8")
    temporary.rename(folder / "deepspeed.json")
    return [*TOY, f"run_dir={folder}", f"deepspeed={folder / 'deepspeed.json'}", *more]


def train(arguments: list[str]) -> str:
    """Run the loop in this process: `finished`, `stopped`, or the message of the error that ended it."""
    from pretrain.config import job_classes, load_job_config
    from pretrain.runtime import start_runtime
    from pretrain.trainer import Trainer, TrainingError

    config = load_job_config(arguments)
    runtime = start_runtime(config)
    task = job_classes(config.job)[1](config, runtime)
    try:
        return "finished" if Trainer(config, runtime, task).run() else "stopped"
    except TrainingError as error:
        return str(error)


def figures(folder: Path, split: str = "train") -> dict[int, dict[str, float]]:
    """What metrics.jsonl says per step, without times."""
    records = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    records = [record for record in records if record["split"] == split]
    assert len({record["step"] for record in records}) == len(records), "a step is recorded twice"
    return {r["step"]: {k: v for k, v in r.items() if not is_measured(k)} for r in records}


def scenarios_on_two_ranks(folder: Path) -> dict[str, list[str]]:
    """All runs that can share one pair of processes; what each ended with."""
    ended: dict[str, list[str]] = {}

    def run(name: str, level: str, *starts: list[str]) -> None:
        ended[name] = [train(toy_arguments(folder / name, level, *more)) for more in starts]

    for level in ("zero1", "zero2", "zero3"):
        run(f"{level}/whole", level, EXACT)
        # Another seed after the interruption: whatever is not in the checkpoint comes back different.
        run(f"{level}/resumed", level, [*EXACT, "signal_at_step=3"], [*EXACT, "seed=1"])
        run(f"{level}/plain", level, PLAIN)
    for level in ("zero1", "zero3"):
        run(f"{level}/nan", level, ["nan_at_step=2", "checkpoint_every=2"])
    for level in ("zero2", "zero3"):
        run(f"{level}/skip", level, ["nan_at_step=2", "on_nonfinite=skip"])
        run(f"{level}/bf16_nan", level, ["nan_at_step=2", "checkpoint_every=2", "precision=bf16"])
    for level in ("zero1", "zero2", "zero3"):
        run(f"{level}/bf16_skip", level, ["nan_at_step=2", "on_nonfinite=skip", "precision=bf16"])
    bf16 = ["precision=bf16", "noise=true"]
    run("bf16/whole", "zero3", bf16)
    run("bf16/resumed", "zero3", [*bf16, "signal_at_step=2"], [*bf16, "seed=1"])
    muon = ["noise=true", "optimizer.name=muon", "gradient_clipping=0"]
    for level in ("zero2", "zero3"):
        run(f"{level}/muon", level, muon)
        run(f"{level}/muon_resumed", level, [*muon, "signal_at_step=3"], [*muon, "seed=1"])
    run("offload", "zero3_offload", ["steps=3"])
    run("killed", "zero3", [*EXACT, "checkpoint_every=2"])
    run("wandb", "zero1", ["steps=2", "log_every=2", "wandb.mode=offline"], ["steps=3", "wandb.mode=offline"])
    return ended


def plain_torch() -> list[tuple[float, float]]:
    """Loss and gradient norm of every step, on the whole batch in one process, without DeepSpeed."""
    from pretrain.config import load_job_config
    from pretrain.optim import build_optimizer, learning_rate_factor
    from pretrain.random_state import seed_everything
    from tests.support.toy_task import ToyLoader, ToyModel

    config = load_job_config([*TOY, "run_dir=unused"], world_size=1)
    seed_everything(config.seed)
    model = ToyModel(config.width)
    optimizer = build_optimizer(model, config.optimizer)
    found = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * learning_rate_factor(step, config.optimizer, config.steps)
        batch = torch.stack([ToyLoader.sample(16 * step + number) for number in range(16)])
        loss = (model(batch) - batch.square().sum(1).sin()).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def start_and_kill(folder: Path) -> None:
    """Start the program on two ranks and kill both after step 3, when step 2 alone has a checkpoint."""
    arguments = toy_arguments(folder, "zero3", *EXACT, "checkpoint_every=2", "sleep_per_step=0.2")
    with Ranks("pretrain.train", arguments) as ranks:
        deadline = time.monotonic() + 300
        metrics, latest = folder / "metrics.jsonl", folder / "checkpoints" / "latest"
        while not latest.exists() or '"step": 3' not in metrics.read_text(encoding="utf-8"):
            assert time.monotonic() < deadline, ranks.output_of(0)
            time.sleep(0.02)
        ranks.send(signal.SIGKILL)
        killed = ranks.wait()
    assert killed.returncodes == [-signal.SIGKILL] * 2
    assert "started in" in killed.outputs[0]  # rank 0 reports; of the other only libraries may say something
    assert not re.search("started in|train +[0-9]", killed.outputs[1])
    assert (folder / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_00000002"
    assert not (folder / "done.json").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("runs")
    start_and_kill(folder / "killed")
    ended, of_rank_1 = run_function(scenarios_on_two_ranks, folder, process_group=False)
    assert ended == of_rank_1
    return folder, ended


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "export" / "model.pt")


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "bf16"])
def test_resumed_run_equals_undisturbed_one(runs, name):
    folder, ended = runs
    assert ended[f"{name}/whole"] == ["finished"]
    assert ended[f"{name}/resumed"] == ["stopped", "finished"]
    whole, resumed = folder / name / "whole", folder / name / "resumed"
    assert figures(resumed) == figures(whole)
    assert sorted(figures(whole)) == list(range(1, 7))
    assert figures(resumed, "val") == figures(whole, "val")
    before, after = exported(whole), exported(resumed)
    assert before.keys() == after.keys()
    for key, value in before.items():
        # Trained, frozen, the buffer and what the task counted.
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[key])), key
    assert before["steps_counted"] == 6


@pytest.mark.parametrize("level", ["zero1", "zero2", "zero3"])
def test_two_ranks_equal_plain_torch_on_the_whole_batch(runs, level):
    found = figures(runs[0] / level / "plain")
    reference = plain_torch()
    assert len(found) == len(reference) == 6
    for step, (loss, norm) in enumerate(reference, start=1):
        # The first engine minimises the mean of means, the second the sum of shares.
        for engine in ("model", "second"):
            assert found[step][f"loss/{engine}"] == pytest.approx(loss, rel=2e-5), step
            assert found[step][f"gradient_norm/{engine}"] == pytest.approx(norm, rel=2e-5), step
    assert reference[5][0] < 0.8 * reference[0][0]


@pytest.mark.parametrize("name", ["zero1/nan", "zero3/nan", "zero2/bf16_nan", "zero3/bf16_nan"])
def test_gradients_that_are_not_finite_end_a_run(runs, name):
    folder, ended = runs
    (message,) = ended[name]
    assert message == (
        "step 3: loss/model is not finite on rank 1, samples sample44, sample45, sample46, sample47; no "
        "parameter was changed; 1 such step(s) in a row with on_nonfinite=error. Lower optimizer.lr, or look "
        "at these samples"
    )
    assert not (folder / name / "done.json").exists()
    assert (folder / name / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_00000002"


@pytest.mark.parametrize("level", ["zero1", "zero2", "zero3"])
def test_gradients_that_are_not_finite_are_skipped_in_bf16(runs, level):
    folder, ended = runs
    assert ended[f"{level}/bf16_skip"] == ["finished"]
    skipped = figures(folder / level / "bf16_skip")
    assert skipped[3]["loss/model"] is None and skipped[4]["lr"] == skipped[3]["lr"]
    assert [skipped[step].get("skipped_steps") for step in (2, 3, 6)] == [None, 1, 1]
    weights = exported(folder / level / "bf16_skip").values()
    assert all(torch.as_tensor(value).isfinite().all() for value in weights)


@pytest.mark.parametrize("level", ["zero2", "zero3"])
def test_gradients_that_are_not_finite_are_skipped(runs, level):
    folder, ended = runs
    assert ended[f"{level}/skip"] == ["finished"]
    skipped, plain = figures(folder / level / "skip"), figures(folder / level / "plain")
    assert skipped[3]["loss/model"] is None
    assert [skipped[step].get("skipped_steps") for step in (2, 3, 6)] == [None, 1, 1]
    # The step that was dropped moved neither parameters nor the schedule.
    assert skipped[4]["lr"] == skipped[3]["lr"] == plain[3]["lr/model"]
    assert skipped[2]["loss/model"] == plain[2]["loss/model"]


@pytest.mark.parametrize("level", ["zero2", "zero3"])
def test_muon_goes_on_exactly(runs, level):
    folder, ended = runs
    assert ended[f"{level}/muon"] == ["finished"]
    assert ended[f"{level}/muon_resumed"] == ["stopped", "finished"]
    whole = figures(folder / level / "muon")
    assert figures(folder / level / "muon_resumed") == whole
    assert whole != figures(folder / level / "whole")  # it is another optimizer


def test_offload(runs):
    folder, ended = runs
    assert ended["offload"] == ["finished"]
    assert len(figures(folder / "offload")) == 3


def test_finished_run(runs):
    folder = runs[0] / "zero2" / "whole"
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    assert done["steps"] == 6 and done["world_size"] == 2 and done["precision"] == "float32"
    assert done["peak_memory_bytes"] > 50e6 and done["wall_seconds"] > 0
    assert done["peak_memory_bytes_all_ranks"] > done["peak_memory_bytes"]
    assert "steps: 6" in (folder / "config.yaml").read_text(encoding="utf-8")
    assert not list(folder.rglob(".writing*"))


def test_finished_run_with_more_steps_goes_on(runs):
    folder, ended = runs
    assert ended["wandb"] == ["finished", "finished"]
    assert sorted(figures(folder / "wandb")) == [2, 3]
    assert json.loads((folder / "wandb" / "done.json").read_text(encoding="utf-8"))["steps"] == 3


def test_console_line_fits():
    numbers = {
        "loss/mse": 0.61984,
        "loss/total": 3.3731,
        "codebook_usage/pixel": 0.5,
        "gradient_norm/a": 78.49,
    }
    numbers |= {f"loss/part{n}": 0.5 for n in range(20)}
    numbers |= {"seconds_per_step": 0.53151, "images_per_second": 15.05, "data_wait": 0.25, "lr/a": 1e-3}
    line = console_line(10, 520, "train", numbers, 100)
    start = (
        "train  10/520  loss 3.373  0.532 s/step  15.1 images/s  25% waiting for data  mse 0.6198  part0 0.5"
    )
    assert line == start
    wide = console_line(10, 520, "train", numbers, 1000)
    assert wide.startswith(start) and wide.endswith("part19 0.5  gradient_norm/a 78.49  lr/a 0.001")
    assert "codebook" not in wide and "waiting" not in console_line(1, 2, "val", {"data_wait": 0.01})
    assert console_line(2, 2, "val", {"loss/model": 0.5}) == "val   2/2  loss/model 0.5"
    several = {"accuracy/text": 0.8, "loss/text": 0.4, "loss/pixel": math.nan, "tokens_per_second": 1730.2}
    assert console_line(2, 9, "val", several) == "val   2/9  loss/text 0.4  1,730 tokens/s  accuracy/text 0.8"


def test_a_wandb_that_is_gone_ends_no_training(tmp_path, capsys):
    """A signal to all processes of a job ends wandb's too, before the last figures have come."""

    def gone(*_, **__):
        raise ConnectionResetError("Connection lost")

    config = JobConfig("toy", str(tmp_path), 2, 1, 1, wandb=WandbConfig("disabled"))
    for last in ("write", "close"):
        log = MetricsLog(config, tmp_path, is_main=True)
        log.start(0)
        log._wandb = SimpleNamespace(log=gone if last == "write" else lambda *_, **__: None, finish=gone)
        log.write(1, "train", {"loss/model": 0.5})
        log.close()
        assert "warning: wandb takes no more figures (Connection lost)" in capsys.readouterr().out
    assert len((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) >= 1


@pytest.mark.parametrize("named", [False, True])
def test_a_closed_pipe_ends_no_training(tmp_path, named):
    """As where an ssh connection ends: `... | true` reads nothing.

    Started by hand, and as by what names ranks and no local ones, each alone on its machine, such as
    Kubeflow's operator.
    """
    arguments = toy_arguments(tmp_path, "zero1", "steps=3")
    command = [sys.executable, "-m", "pretrain.train", *arguments]
    names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    inherited = {key: value for key, value in os.environ.items() if key not in {*names, "LOCAL_RANK"}}
    environment = {**inherited, **(names if named else {}), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as training:
        training.stdout.close()
        assert training.wait(300) == 0
    assert (tmp_path / "done.json").exists() and sorted(figures(tmp_path)) == [1, 2, 3]


def test_a_signal_during_the_start_stops_after_the_first_step(tmp_path):
    arguments = toy_arguments(tmp_path, "zero1", "optimizer.warmup_steps=6")
    with Ranks("pretrain.train", arguments, world_size=1) as ranks:
        (process,) = ranks.processes
        status = Path(f"/proc/{process.pid}/status")
        while not caught(status) & 1 << (signal.SIGUSR1 - 1):  # Python itself is still starting
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGUSR1)
        finished = ranks.wait().check()
    assert "stopped by SIGUSR1 after step 1; checkpoint written" in finished.output
    rises = "warning: optimizer.warmup_steps=6 of steps=6: the rate rises to the end of the run"
    assert rises in finished.output
    assert (tmp_path / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_00000001"


def caught(status: Path) -> int:
    """Bit mask of the signals that a process has handlers for."""
    lines = status.read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)


def test_figures_and_pictures(runs):
    folder = runs[0] / "wandb"
    records = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    train_record, val_record = records[0], records[1]
    expected = {"step", "split", "time", "seconds_per_step", "data_wait", "lr", "loss/model"}
    assert expected <= train_record.keys()
    assert train_record["samples_per_second"] > 0 and 0 <= train_record["data_wait"] <= 1
    assert val_record["split"] == "val" and val_record["never_counted"] is None
    picture = Image.open(folder / "images" / "step_00000002_picture.png")
    assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (200, 200, 200)
    # Two starts of one run: two files of the same wandb run.
    wandb_id = (folder / "wandb_id").read_text(encoding="utf-8")
    assert len(list((folder / "wandb").glob(f"offline-run-*-{wandb_id}"))) == 2


def test_killed_run_goes_on_exactly(runs):
    folder, ended = runs
    assert ended["killed"] == ["finished"]
    assert figures(folder / "killed") == figures(folder / "zero3" / "whole")
    assert figures(folder / "killed", "val") == figures(folder / "zero3" / "whole", "val")
    checkpoints = sorted(os.listdir(folder / "killed" / "checkpoints"))
    assert checkpoints == ["latest", "step_00000004", "step_00000006"]
