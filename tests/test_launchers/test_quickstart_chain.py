"""The chain's machinery: what is skipped, what runs again, how failures and signals end."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from launchers import processes, quickstart
from launchers.errors import UserError
from launchers.quickstart import ChainRecord, Step, quickstart_steps, run_chain

ROOT = Path(__file__).resolve().parents[2]


def touching(path: Path, before: str = "pass") -> tuple[str, ...]:
    """A command that does `before` and then makes a file."""
    make = (
        f"import pathlib; p = pathlib.Path({str(path)!r}); p.parent.mkdir(exist_ok=True); p.write_text('x')"
    )
    return ("python", "-S", "-c", f"{before}\n{make}")


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Two steps, the second made from the first; returns their folder."""
    first, second = tmp_path / "one" / "done", tmp_path / "two" / "done"
    steps = [
        Step("one", "the first", touching(first), first),
        Step("two", "the second", touching(second), second, ("one",)),
    ]
    monkeypatch.setattr(quickstart, "quickstart_steps", lambda root, ranks, seed: steps)
    return tmp_path


def test_runs_everything_then_nothing(chain):
    said: list[str] = []
    record = run_chain(chain, 1, said.append)
    assert [step.attempts for step in record.steps.values()] == [1, 1]
    assert "[1/2] one: the first\n$ python -S -c" in said[0]
    content = json.loads((chain / "chain.json").read_text(encoding="utf-8"))
    assert content["steps"]["one"]["seconds"] > 0
    assert content["peak_memory_bytes"] > 2**20
    assert content["machine"]["ranks"] == 1
    said.clear()
    record = run_chain(chain, 1, said.append)
    assert [step.attempts for step in record.steps.values()] == [1, 1]
    assert said[0].startswith("[1/2] one: done before") and said[-1].startswith("Nothing left to do")


def test_remakes_what_is_older_than_its_source(chain, capsys):
    run_chain(chain, 1, lambda line: None)
    before = time.time() - 10
    os.utime(chain / "two" / "done", (before, before))
    run_chain(chain, 1, lambda line: None)
    assert len(list(chain.glob("two.outdated-*"))) == 1
    assert (chain / "two" / "done").stat().st_mtime > before
    assert "made before one: moved to" in capsys.readouterr().err


def test_a_step_without_its_result_has_failed(chain, monkeypatch):
    steps = [Step("empty", "nothing", ("python", "-S", "-c", "pass"), chain / "never")]
    monkeypatch.setattr(quickstart, "quickstart_steps", lambda root, ranks, seed: steps)
    with pytest.raises(UserError, match=r"step empty ended with exit code 0 without making .*never"):
        run_chain(chain, 1, lambda line: None)
    assert ChainRecord.load(chain / "chain.json").steps["empty"].finished_at is None


def test_times_add_up_over_attempts(chain, monkeypatch):
    done = chain / "done"
    failing = Step("s", "x", ("python", "-S", "-c", "import sys; sys.exit(3)"), done)
    monkeypatch.setattr(quickstart, "quickstart_steps", lambda root, ranks, seed: [failing])
    with pytest.raises(UserError, match="exit code 3"):
        run_chain(chain, 1, lambda line: None)
    first = ChainRecord.load(chain / "chain.json").steps["s"].seconds
    working = Step("s", "x", touching(done), done)
    monkeypatch.setattr(quickstart, "quickstart_steps", lambda root, ranks, seed: [working])
    step = run_chain(chain, 1, lambda line: None).steps["s"]
    assert step.attempts == 2 and step.seconds > first > 0


def test_only_one_chain_at_a_time(chain):
    held = processes.only_one(chain, "quickstart", "--run")
    with held, pytest.raises(UserError, match="another quickstart is at work"):
        run_chain(chain, 1, lambda line: None)


def test_a_signal_reaches_every_process(tmp_path):
    """SIGTERM to the chain becomes SIGTERM to grandchildren, which may finish their work."""
    script = textwrap.dedent(f"""
        import signal, subprocess, sys, time
        if len(sys.argv) == 1:
            child = subprocess.Popen([sys.executable, "-S", __file__, "child"])
            child.wait()
        def save(*_):
            open({str(tmp_path / "saved")!r}, "w").close()
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        open({str(tmp_path / "ready")!r}, "w").close()
        time.sleep(60)
    """)
    (tmp_path / "job.py").write_text(script, encoding="utf-8")
    # Without the look for a GPU, which takes seconds.
    runner = (
        "import os; from launchers import processes; processes.environment = lambda count: dict(os.environ); "
        "processes.run(['python', '-S', '{}'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", runner.format(tmp_path / "job.py")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert (tmp_path / "saved").exists()


def test_leftovers_of_a_killed_chain_are_ended(chain):
    started = time.time()
    leftover = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    ChainRecord(session=leftover.pid, session_started=started).save(chain / "chain.json")
    said: list[str] = []
    waiter = psutil.Process(leftover.pid)
    run_chain(chain, 1, said.append)
    assert said[0] == "ended 1 processes that a killed run had left behind"
    assert leftover.wait(5) == -signal.SIGTERM or not waiter.is_running()


def test_environment_shares_cores(monkeypatch):
    monkeypatch.setattr(processes, "available_cores", lambda: 8)
    assert processes.environment(2)["OMP_NUM_THREADS"] == "4"
    assert processes.environment(16)["OMP_NUM_THREADS"] == "1"


def test_large_tensors_lie_in_huge_pages_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert processes.environment(2)["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert processes.environment(2)["THP_MEM_ALLOC_ENABLE"] == "0"


def test_kernels_kept_on_a_cpu_are_few_unless_the_user_says_how_many(monkeypatch):
    """oneDNN's own number, 1024, is half a gigabyte of kernels a rank in bf16."""
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    for has_gpu, kept in ((False, "256"), (True, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert processes.environment(2).get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == kept
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    assert processes.environment(2)["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "1024"


def test_memory_of_a_command_is_measured():
    command = ["python", "-S", "-c", "a = bytearray(200_000_000); import time; time.sleep(1.5)"]
    finished = processes.run(command)
    assert 200e6 < finished.peak_memory_bytes < 300e6
    assert finished.returncode == 0 and finished.seconds >= 1.5


def test_the_launcher_starts_ranks_on_the_visible_gpus(monkeypatch):
    """DeepSpeed's own would take the first ones of the machine, which may be another's."""
    from deepspeed.launcher.runner import parse_args, parse_resource_filter

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert processes.deepspeed_command("a.b", [], 2)[1:3] == ["--num_gpus", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,2")
    command = processes.deepspeed_command("a.b", ["x=1"], 2)
    options = parse_args(command[1:])
    assert (options.num_gpus, options.module, options.user_args) == (-1, True, ["x=1"])
    machine = {"localhost": list(range(8))}
    assert parse_resource_filter(machine, options.include) == {"localhost": [3, 5]}
    for visible in ("7", "GPU-8932f937,GPU-5a3b1c2d"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={visible} for 2 rank"):
            processes.deepspeed_command("a.b", [], 2)


def test_steps_form_a_chain(tmp_path):
    steps = quickstart_steps(tmp_path, 2)
    seen: set[str] = set()
    for step in steps:
        assert set(step.needs) <= seen, f"{step.name} needs what comes later"
        assert tmp_path in step.done.parents
        seen.add(step.name)
    jobs = [step for step in steps if "pretrain.train" in step.command]
    assert [job.name for job in jobs] == ["siglip", "tokenizer", "mllm"]
    for job in jobs:
        assert job.command[:5] == ("deepspeed", "--num_gpus", "2", "--module", "pretrain.train")


def test_jobs_are_sent_to_another_folder(tmp_path):
    from pretrain.config import config_as_yaml, load_job_config

    for step in quickstart_steps(tmp_path, 2):
        if "pretrain.train" in step.command:
            settings = config_as_yaml(load_job_config(step.command[5:], world_size=2))
            assert "runs/quickstart" not in settings and str(tmp_path) in settings
    usual = {step.name: step.command for step in quickstart_steps(Path("runs/quickstart"), 2)}
    assert usual["mllm"][5:] == ("recipe=quickstart_mllm", "run_dir=runs/quickstart/mllm")


def test_a_seed_is_of_the_data_and_of_every_training(tmp_path):
    from pretrain.config import load_job_config

    commands = {step.name: step.command for step in quickstart_steps(tmp_path, 2, 5)}
    assert commands["sample-data"][-2:] == ("--seed", "5")
    for job in ("siglip", "tokenizer", "mllm"):
        assert load_job_config(commands[job][5:], world_size=2).seed == 5


def test_a_chain_keeps_its_seed(chain):
    run_chain(chain, 1, lambda line: None, 1)
    with pytest.raises(UserError, match=r"with seed 1, not 0.*--seed 1"):
        run_chain(chain, 1, lambda line: None)
    said: list[str] = []
    run_chain(chain, 1, said.append, 1)
    assert "done before" in said[0]


def wait_for(path: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)
