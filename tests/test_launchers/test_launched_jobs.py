"""Jobs that are really started: by Slurm's script, and on two nodes with a network between them."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.pretend_slurm import ROOT, events, install
from tests.support.tiny_run import make_tiny_run
from tests.support.toy_words import TOY_WORDS
from tests.support.two_nodes import NoNamespacesError, own_networks

TOY = [*TOY_WORDS, "deepspeed=zero3.json"]


def figures(folder: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    return {record["step"]: (record["loss/model"], record["gradient_norm"]) for record in records}


def wait_for(condition) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def train_until_time_is_up(folder: Path, most_starts: int = 1) -> tuple[list[str], str]:
    """What happened to a job of two tasks on one node, and its log; after two steps its time is nearly up."""
    env = {**install(folder / "slurm", most_starts), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    script = str(ROOT / "launchers" / "slurm" / "train.sbatch")
    options = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"]
    command = ["sbatch", *options, script, *TOY, "run_dir=run", "sleep_per_step=0.3"]
    with subprocess.Popen(command, env=env, cwd=folder) as job:
        metrics = folder / "run" / "metrics.jsonl"
        wait_for(lambda: job.poll() is not None or (metrics.exists() and len(figures(folder / "run")) > 1))
        job.send_signal(signal.SIGUSR1)
        code = job.wait(timeout=200)
    log = (folder / "dualtoken-7001.log").read_text(encoding="utf-8")
    assert code == 0, log
    return events(env), log


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    """Folder, events and log of a job on two ranks of one node."""
    folder = tmp_path_factory.mktemp("one_node")
    return folder, *train_until_time_is_up(folder)


@pytest.fixture
def apart(tmp_path):
    try:
        with own_networks(tmp_path) as nodes:
            yield nodes
    except NoNamespacesError as error:
        pytest.skip(f"no network namespaces: {error}")


def test_job_that_runs_out_of_time_is_queued_again(one_node):
    folder, happened, log = one_node
    assert "2 rank(s) on cpu" in log and "stopped by SIGUSR1 after step" in log
    assert log.count("stopped before the last step: queued again") == 1
    assert happened == ["start 1", "requeue 7001"]
    assert (folder / "run" / "checkpoints" / "latest").exists()
    assert not (folder / "run" / "done.json").exists()


@pytest.mark.slow
def test_job_queued_again_goes_on_to_the_end(tmp_path):
    happened, log = train_until_time_is_up(tmp_path, most_starts=3)
    assert happened == ["start 1", "requeue 7001", "start 2"]
    assert (
        "stopped by SIGUSR1" in log and "resumed from run/checkpoints/step_" in log and "done: run\n" in log
    )
    assert sorted(figures(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_array_of_workers_shares_out_shards(tmp_path):
    env = install(tmp_path / "slurm")
    run = make_tiny_run(tmp_path / "tiny")
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(4):
        shutil.copy(run / "sample_data/images/train/drawings/shard-000000.tar", shards / f"{number}.tar")
    script = str(ROOT / "launchers" / "slurm" / "pretokenize.sbatch")
    words = [
        "--inputs",
        str(shards),
        "--visual-tokenizer",
        str(run / "tokenizer/export"),
        "--output",
        "codes",
    ]
    command = ["sbatch", "--array=0-1", script, *words, "--prefix-keys"]
    done = subprocess.run(command, env=env, cwd=tmp_path, timeout=200)
    logs = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("pretokenize-*.log"))]
    assert done.returncode == 0 and events(env) == ["start 1", "start 1"], logs
    assert all(f"worker {number} of 2" in log for number, log in enumerate(logs))
    assert "48 samples in, 48 out, 0 rejected" in "".join(logs)
    assert len(list((tmp_path / "codes").glob("*.tar"))) == 4


DEEPSPEED = (
    'deepspeed --hostfile "{hosts}" --no_ssh --node_rank $NODE_RANK --master_addr $MASTER_ADDR --module '
)
TORCHRUN = "torchrun --nnodes $NODES --nproc_per_node 1 "
LAUNCHERS = {
    "deepspeed": DEEPSPEED,
    "static": TORCHRUN + "--node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port 29500 -m ",
    # The namespaces have no host names by which the first node would know that it is the first.
    "c10d": TORCHRUN + "--rdzv_backend c10d --rdzv_endpoint $MASTER_ADDR:29500 --rdzv_id toy "
    "--rdzv_conf is_host=$((NODE_RANK == 0)) --local_addr 10.77.0.$((NODE_RANK + 1)) -m ",
}


@pytest.mark.parametrize(
    "launcher",
    ["deepspeed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("static", "c10d"))],
)
def test_two_nodes_equal_one(apart, tmp_path, one_node, launcher):
    start = LAUNCHERS[launcher].format(hosts=apart.hostfile)
    code, output = apart.run(f"{start} pretrain.train {' '.join(TOY)} run_dir={tmp_path}/run")
    assert code == 0, output[-6000:]
    assert "2 rank(s) on cpu" in output
    assert launcher != "deepspeed" or "nnodes=2, num_local_procs=1, node_rank=1" in output
    found, expected = figures(tmp_path / "run"), figures(one_node[0] / "run")
    assert len(found) == 6 and len(expected) > 1
    assert {step: found[step] for step in expected} == expected


@pytest.mark.slow
def test_rank_that_dies_ends_both_nodes(apart, tmp_path):
    run = f"run_dir={tmp_path}/run"
    start = DEEPSPEED.format(hosts=apart.hostfile)
    command = f"{start} pretrain.train {' '.join(TOY)} {run} steps=1000 sleep_per_step=0.1"
    with apart.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as script:
        wait_for((tmp_path / "run" / "metrics.jsonl").exists)
        # One of the two: a rank's command line, and no launcher's, has these words side by side.
        killed = subprocess.run(["pkill", "-KILL", "-n", "-f", "--", f"-u -m pretrain.train .*{run}"])
        output, _ = script.communicate(timeout=100)
    assert killed.returncode == 0 and script.returncode != 0
