"""Slurm's commands as far as launchers/slurm uses them, on this machine: sbatch, srun and scontrol.

A job's script runs from a spool folder with the variables that Slurm sets, srun starts a process for each
task, and a job that `scontrol requeue` names starts again. A SIGUSR1 to `sbatch` says that time is nearly up:
then it delivers the signal that the job's `--signal` asks for. Unknown options are errors.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = "PRETEND_SLURM"  # the folder of its commands and of what jobs leave behind
MOST_STARTS = "PRETEND_SLURM_STARTS"


def install(folder: Path, most_starts: int = 1) -> dict[str, str]:
    """Put the commands into a folder; the environment in which they, and this project, are found."""
    folder.mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol"):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    return {
        **{key: value for key, value in kept.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        STATE: str(folder),
        MOST_STARTS: str(most_starts),
    }


def events(env: dict[str, str]) -> list[str]:
    """What happened, a line each: starts with their number, requeues with the job."""
    path = Path(env[STATE]) / "events"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def note(line: str) -> None:
    with (Path(os.environ[STATE]) / "events").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def options_of_job(words: list[str]) -> tuple[argparse.Namespace, Path, list[str]]:
    """Options in force, the script and its arguments: those of the command line over those in the script."""
    parser = argparse.ArgumentParser(prog="sbatch", allow_abbrev=False)
    for name in ("job-name", "output", "time", "array", "partition", "gpus", "gpus-per-node"):
        parser.add_argument(f"--{name}")
    for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--open-mode", choices=["append", "truncate"], default="truncate")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--signal", type=re.compile(r"(B:)?(\w+)@(\d+)").fullmatch)
    end = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
    script = Path(words[end])
    lines = script.read_text(encoding="utf-8").splitlines()
    in_script = [line.removeprefix("#SBATCH ").strip() for line in lines if line.startswith("#SBATCH ")]
    return parser.parse_args([*in_script, *words[:end]]), script, words[end + 1 :]


class Batch:
    """One job, or one task of an array, from its first start to its last."""

    def __init__(self, job: int, options: argparse.Namespace, variables: dict[str, str]) -> None:
        self.job, self.options = job, options
        tasks = options.nodes * options.ntasks_per_node if options.ntasks == 1 else options.ntasks
        self.variables = {
            **variables,
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": f"node[1-{options.nodes}]",
            "SLURM_NTASKS": str(tasks),
            "SLURM_NTASKS_PER_NODE": str(options.ntasks_per_node),
            "SLURM_CPUS_PER_TASK": str(options.cpus_per_task),
            "SLURM_PROCID": "0",  # of the batch script, which is no task of srun
            "SLURM_LOCALID": "0",
        }
        self.requeued = Path(os.environ[STATE]) / f"requeued.{job}"
        self.starts = 0

    def start(self, script: Path, arguments: list[str]) -> None:
        self.requeued.unlink(missing_ok=True)
        self.starts += 1
        note(f"start {self.starts}")
        name = self.options.output.replace("%x", self.options.job_name).replace("%j", str(self.job))
        name = name.replace("%A", str(self.job)).replace("%a", self.variables.get("SLURM_ARRAY_TASK_ID", ""))
        if self.options.open_mode == "truncate":
            Path(name).unlink(missing_ok=True)
        with open(name, "ab") as log:
            self.process = subprocess.Popen(
                ["bash", str(script), *arguments],
                env={**os.environ, **self.variables, "SLURM_RESTART_COUNT": str(self.starts - 1)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def warn(self) -> None:
        """The time limit comes near: to every process of the steps, or to the batch shell alone."""
        to_shell, name, _ = self.options.signal.groups()
        number = signal.Signals[f"SIG{name}"]
        if to_shell:
            self.process.send_signal(number)
            return
        for step in Path(os.environ[STATE]).glob(f"step.{self.job}.*"):
            for group in json.loads(step.read_text(encoding="utf-8")):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, number)

    def wait(self) -> int:
        code = self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what the script has left running
        return code


def sbatch(words: list[str]) -> int:
    """Run a job to its end, unlike Slurm, which returns at once."""
    options, script, arguments = options_of_job(words)
    spooled = Path(os.environ[STATE]) / "spool" / "slurm_script"
    spooled.parent.mkdir(exist_ok=True)
    shutil.copy(script, spooled)
    if options.array is None:
        batches = [Batch(7001, options, {})]
    else:
        first, last = map(int, options.array.split("-"))
        array = {"SLURM_ARRAY_JOB_ID": "7001", "SLURM_ARRAY_TASK_COUNT": str(last - first + 1)}
        batches = [
            Batch(7001 + number, options, {**array, "SLURM_ARRAY_TASK_ID": str(number)})
            for number in range(first, last + 1)
        ]
    signal.signal(signal.SIGUSR1, lambda *_: [batch.warn() for batch in batches])
    waiting, codes = batches, {}
    for _ in range(int(os.environ[MOST_STARTS])):
        for batch in waiting:
            batch.start(spooled, arguments)
        codes |= {batch.job: batch.wait() for batch in waiting}
        waiting = [batch for batch in waiting if options.requeue and batch.requeued.exists()]
    return max(codes.values(), key=abs)


def srun(words: list[str]) -> int:
    """Start the tasks of a step; the highest exit code of all is that of the step."""
    parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
    parser.add_argument("--kill-on-bad-exit", type=int, default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    count, per_node = (int(os.environ[name]) for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"))
    tasks = []
    for rank in range(count):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node}
        own |= {"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": count}
        env = {**os.environ, **{name: str(value) for name, value in own.items()}}
        tasks.append(subprocess.Popen(options.command, env=env, start_new_session=True))
    step = Path(os.environ[STATE]) / f"step.{os.environ['SLURM_JOB_ID']}.{os.getpid()}"
    step.write_text(json.dumps([task.pid for task in tasks]), encoding="utf-8")
    while any(task.poll() is None for task in tasks):
        if options.kill_on_bad_exit and any(task.poll() for task in tasks):
            for task in tasks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(task.pid, signal.SIGKILL)
        time.sleep(0.05)
    step.unlink()
    return max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks))


def scontrol(words: list[str]) -> int:
    match words:
        case ["show", "hostnames", nodes]:
            first, last = re.fullmatch(r"node\[(\d+)-(\d+)\]", nodes).groups()
            # All of them are this machine.
            print(*["127.0.0.1" for _ in range(int(first), int(last) + 1)], sep="\n")
        case ["requeue", job]:
            (Path(os.environ[STATE]) / f"requeued.{job}").touch()
            note(f"requeue {job}")
        case _:
            sys.exit(f"scontrol: {words} is not pretended")
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
