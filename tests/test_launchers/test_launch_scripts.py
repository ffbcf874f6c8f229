"""The scripts of launchers/, without training: what starts where, what ends what, what is queued again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.ranks import name_ranks
from tests.support.pretend_slurm import ROOT, events, install
from tests.support.two_nodes import same_machine

SLURM = ROOT / "launchers" / "slurm"
# Of a job that could not take a step: none is started.
SETTINGS = [
    "job=pretrain.config:JobConfig:JobConfig",
    "steps=6",
    "global_batch_size=16",
    "micro_batch_size=4",
    "run_dir=run",
]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]


@pytest.fixture
def here(tmp_path):
    return same_machine(tmp_path)


def test_command_runs_on_every_host(here):
    code, output = here.run('echo "$NODE_RANK of $NODES it\'s" \\\n  $MASTER_ADDR "$PWD"')
    assert code == 0
    first = here.hostfile.read_text(encoding="utf-8").splitlines()[1].split()[0]
    ending = f"of 2 it's {first} {Path.cwd()}"
    assert sorted(output.splitlines()) == [f"0 {ending}", f"1 {ending}"]


def test_variables_are_carried_and_keys_are_not(here):
    here.env.update(NCCL_DEBUG="IN FO", HF_TOKEN="key", WANDB_API_KEY="key", MASTER_ADDR="10.0.0.7")
    code, output = here.run('echo "$NCCL_DEBUG;$HF_TOKEN$WANDB_API_KEY;$MASTER_ADDR"')
    assert (code, output) == (0, "IN FO;;10.0.0.7\n" * 2)


def test_host_that_fails_ends_the_others(here, tmp_path):
    started = time.monotonic()
    mark = f'"{tmp_path}"/started'
    code, output = here.run(
        f"if [ $NODE_RANK = 1 ]; then until [ -e {mark} ]; do sleep 0.1; done; exit 7; fi; "
        f"trap 'echo ended' EXIT; touch {mark}; sleep 100"
    )
    assert code == 7 and "ended" in output and time.monotonic() - started < 50


def test_host_that_fails_before_another_has_a_group_ends_it(here, tmp_path):
    commands = Path(here.env["PATH"].split(":")[0])
    slow = f'#!/bin/sh\nsleep 2\nexec {shutil.which("setsid")} "$@"\n'
    commands.joinpath("setsid").write_text(slow, encoding="utf-8")
    commands.joinpath("setsid").chmod(0o755)
    started = time.monotonic()
    code, _ = here.run("if [ $NODE_RANK = 1 ]; then exit 7; fi; sleep 100")
    assert code == 7 and time.monotonic() - started < 50


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_script_that_is_ended_ends_the_hosts(here, tmp_path, number, code):
    marks = f'"{tmp_path}"/$NODE_RANK'
    command = f"trap 'touch {marks}.ended; exit' TERM; touch {marks}.started; sleep 100 & wait"

    def as_from_a_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background has it ignored

    with here.start(command, start_new_session=True, preexec_fn=as_from_a_terminal) as script:
        wait_for(lambda: len(list(tmp_path.glob("*.started"))) == 2)
        if number == "SIGINT":  # from a keyboard it goes to every process
            os.killpg(script.pid, signal.SIGINT)
        else:  # killed, the script can tell nobody: its ssh ends, and so does the other side
            script.send_signal(signal.Signals[number])
    wait_for(lambda: len(list(tmp_path.glob("*.ended"))) == 2)
    assert script.returncode == code


def wait_for(condition):
    deadline = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("content", ["", "# none\n", None])
def test_hostfile_without_hosts(here, content):
    here.hostfile.unlink()
    if content is not None:
        here.hostfile.write_text(content, encoding="utf-8")
    code, output = here.run("true")
    assert code == 2
    assert f"error: {here.hostfile} names no machine" in output or "usage: on_hosts.sh HOSTFILE" in output


def run_job(env: dict[str, str], folder: Path, script: str, options: list[str], *arguments: str):
    """Exit code and log of a job that runs to its end."""
    command = ["sbatch", *options, str(SLURM / script), *arguments]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, timeout=200)
    log = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.log")))
    assert not done.stdout + done.stderr, done.stderr.decode()
    return done.returncode, log


@pytest.fixture
def stand_in(tmp_path):
    """An environment whose `python -u -m ...` notes how it was called and does what it is told."""
    env = install(tmp_path / "slurm")
    python = tmp_path / "slurm" / "python"
    python.write_text(
        f"""#!/bin/bash
if [[ $1 = - ]]; then exec {env["PATH"].split(":")[1]}/python "$@"; fi
echo "rank $SLURM_PROCID of $SLURM_NTASKS: $MASTER_ADDR $MASTER_PORT," \\
    "$OMP_NUM_THREADS threads, $SRUN_CPUS_PER_TASK cores: $*"
eval "$DO"
""",
        encoding="utf-8",
    )
    python.chmod(0o755)
    env.pop("OMP_NUM_THREADS")
    return env


def test_each_task_of_a_job_is_a_rank(stand_in, tmp_path):
    options = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=3"]
    env = {**stand_in, "DO": "mkdir -p run; touch run/done.json"}
    code, log = run_job(env, tmp_path, "train.sbatch", options, *SETTINGS)
    assert code == 0 and events(env) == ["start 1"]
    words = f"-u -m pretrain.train {' '.join(SETTINGS)}"
    expected = [f"rank {rank} of 4: 127.0.0.1 17001, 3 threads, 3 cores: {words}" for rank in range(4)]
    assert sorted(log.splitlines()) == ["done: run", *expected]


def test_what_a_library_prints_is_no_run_folder(stand_in, tmp_path):
    # As DeepSpeed does where it finds no GPU; the job would be queued again for ever.
    noisy = "print('a library says this')\nfrom pretrain.config import JobConfig\n"
    (tmp_path / "noisy.py").write_text(noisy, encoding="utf-8")
    env = {**stand_in, "DO": "mkdir -p run; touch run/done.json"}
    env["PYTHONPATH"] += f":{tmp_path}"
    words = ["job=noisy:JobConfig:JobConfig", *SETTINGS[1:]]
    code, log = run_job(env, tmp_path, "train.sbatch", TWO_NODES, *words)
    assert code == 0 and events(env) == ["start 1"]
    assert "a library says this" in log and "done: run" in log.splitlines()


def test_job_that_fails_is_not_queued_again(stand_in, tmp_path):
    env = {**stand_in, "DO": "if [[ $SLURM_PROCID = 1 ]]; then exit 3; fi; sleep 100"}
    started = time.monotonic()
    code, log = run_job(env, tmp_path, "train.sbatch", TWO_NODES, *SETTINGS)
    assert time.monotonic() - started < 50  # the other task was ended
    assert code == 137 and "queued again" not in log and events(env) == ["start 1"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stepz=3", "error: unknown key 'stepz' (did you mean 'steps'?)"),
        (
            "global_batch_size=9",
            "global_batch_size=9 cannot be split: expected a multiple of micro_batch_size 4 x 2",
        ),
    ],
)
def test_mistake_ends_a_job_before_its_ranks_start(stand_in, tmp_path, word, message):
    code, log = run_job(stand_in, tmp_path, "train.sbatch", TWO_NODES, *SETTINGS, word)
    assert code == 2 and message in log and len(log.splitlines()) == 1
    assert events(stand_in) == ["start 1"]


def test_workers_of_an_array(stand_in, tmp_path):
    env = {
        **stand_in,
        "DO": "echo worker $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_TASK_COUNT; exit $SLURM_ARRAY_TASK_ID",
    }
    words = ["--inputs", "a b", "--output", "codes"]
    code, log = run_job(env, tmp_path, "pretokenize.sbatch", ["--array=0-1"], *words)
    assert code == 1 and events(env) == ["start 1", "start 1"]
    assert "worker 0 of 2" in log and "worker 1 of 2" in log
    assert (
        log.count("8 threads") == 2
        and log.count("-u -m data_pipeline.pretokenize --inputs a b --output codes") == 2
    )


def test_worker_of_an_array_that_runs_out_of_time_is_queued_again(stand_in, tmp_path):
    # The time limit comes near as the workers start, and they would not end of themselves.
    env = {**stand_in, "DO": f'touch "{tmp_path}/at_work.$SLURM_ARRAY_TASK_ID"; sleep 100'}
    command = ["sbatch", "--array=0-1", str(SLURM / "pretokenize.sbatch"), "--output", "codes"]
    with subprocess.Popen(command, env=env, cwd=tmp_path) as job:
        deadline = time.monotonic() + 50
        while len(list(tmp_path.glob("at_work.*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=50)
    assert sorted(events(env)) == ["requeue 7001", "requeue 7002", "start 1", "start 1"]


SRUN = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
MEET = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({**SRUN, **MEET}, ("9", "16", "1")),
        ({**SRUN, **MEET, "CUDA_VISIBLE_DEVICES": "0,1"}, ("9", "16", "1")),
        ({**SRUN, **MEET, "CUDA_VISIBLE_DEVICES": "1"}, ("9", "16", "0")),
        # Slurm's batch script, and a step of one task.
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}, None),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, None),
        # mpirun inside an allocation, whose helpers srun has started.
        (
            {
                **SRUN,
                **MEET,
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            ("3", "4", "1"),
        ),
        ({**MEET, "PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALRANKID": "0"}, ("2", "4", "0")),
        # A launcher that srun starts on each node has the last word.
        ({**SRUN, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}, ("5", "8", "2")),
    ],
)
def test_ranks(environment, ranks):
    name_ranks(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    assert tuple(environment.get(name) for name in names) == (ranks or (None, None, None))


def test_ranks_that_cannot_find_each_other():
    expected = (
        "SLURM_STEP_NUM_TASKS=16, but MASTER_ADDR and MASTER_PORT not set: expected the name of the first "
        "machine and a free port of it, where the processes meet; export them"
    )
    with pytest.raises(ConfigError, match=expected):
        name_ranks(dict(SRUN))
    # Not sixteen runs of one rank in one folder.
    env = {**os.environ, **SRUN, "MASTER_ADDR": "node-1"}
    command = [sys.executable, "-m", "pretrain.train", "recipe=quickstart_tokenizer"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.startswith("error: SLURM_STEP_NUM_TASKS=16, ")
