"""Runs code on several ranks, as the real processes a launcher would start, on this machine and gloo.

Most of what a short job takes is importing. So ranks are forked from a process that has imported already, one
for each test session, unless imports would look at another environment: one that a test gives them, or that
of a session on a GPU, where these ranks are to compute on the CPU.
"""

import atexit
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    [
        "data_pipeline.pretokenize.command",
        "pretrain.contrastive_task",
        "pretrain.mllm_task",
        "pretrain.tokenizer_task",
        "pretrain.trainer",
    ]
)


@dataclass
class Finished:
    """What the ranks left behind."""

    returncodes: list[int]
    outputs: list[str]  # stdout and stderr of each rank

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)

    def check(self) -> "Finished":
        assert not any(self.returncodes), f"exit codes {self.returncodes}\n{self.output[-6000:]}"
        return self


def _started(module: str, arguments: list[str], env: dict[str, str], log: IO[str]) -> subprocess.Popen:
    """`python -m MODULE ARGUMENTS`, as a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


class _Forked:
    """The same from a process that has imported; to be used as a `Popen`."""

    def __init__(self, module: str, arguments: list[str], env: dict[str, str], log: IO[str]) -> None:
        output = f"/proc/{os.getpid()}/fd/{log.fileno()}"
        self.process = _FORKED.Process(target=_run_here, args=(module, arguments, env, output))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.pid, number)


def _run_here(module: str, arguments: list[str], env: dict[str, str], output: str) -> None:
    """Be the process that `python -m MODULE ARGUMENTS` would start."""
    log = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *arguments]
    sys.path[0] = str(ROOT)
    sys.modules.pop(module, None)  # it is to run, not to have been imported
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:  # a forked process leaves them out
        atexit._run_exitfuncs()


class Ranks:
    """`python -m MODULE ARGUMENTS` once per rank, with the environment that torchrun would set.

    Used in a `with` statement, no process survives the block.
    """

    def __init__(
        self, module: str, arguments: list[str], world_size: int = 2, env: dict[str, str] | None = None
    ) -> None:
        self.logs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]
        shared = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            **(env or {}),
        }
        start = _Forked if env is None and os.environ.get("DS_ACCELERATOR") == "cpu" else _started
        self.processes = [
            start(module, arguments, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log)
            for rank, log in enumerate(self.logs)
        ]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def output_of(self, rank: int) -> str:
        """What the rank has written so far."""
        with open(f"/proc/self/fd/{self.logs[rank].fileno()}", encoding="utf-8", errors="replace") as file:
            return file.read()

    def send(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, timeout: float = 300) -> Finished:
        """Wait for all ranks; when one fails or time is up, the rest is killed, as launchers do."""
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in self.processes):
                if time.monotonic() > deadline:
                    outputs = "\n".join(self.output_of(rank)[-3000:] for rank in range(len(self.processes)))
                    raise TimeoutError(f"ranks still running after {timeout} s:\n{outputs}")
                if any(process.poll() not in (None, 0) for process in self.processes):
                    time.sleep(0.3)  # the others may be about to say the same
                    break
                time.sleep(0.02)
        finally:
            self.send(signal.SIGKILL)
            codes = [process.wait() for process in self.processes]
            outputs = [self.output_of(rank) for rank in range(len(self.processes))]
            for log in self.logs:
                log.close()
        return Finished(codes, outputs)


def run_code(code: str, payload: object) -> bytes:
    """What Python code that reads a pickled `payload` from standard input prints, in a new process."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(payload),
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return result.stdout


def run_module(
    module: str,
    arguments: list[str],
    world_size: int = 2,
    timeout: float = 300,
    env: dict[str, str] | None = None,
) -> Finished:
    """Run `python -m module arguments` on `world_size` ranks and wait."""
    with Ranks(module, arguments, world_size, env) as ranks:
        return ranks.wait(timeout)


def run_function(
    function: Callable[..., Any],
    *arguments: Any,
    world_size: int = 2,
    timeout: float = 300,
    process_group: bool = True,
) -> list[Any]:
    """Call a module-level function with picklable arguments on every rank; returns what each rank returned.

    With `process_group` torch.distributed is initialised with gloo before; leave it out for functions that
    start DeepSpeed themselves.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call.pkl"
        name = f"{function.__module__}:{function.__qualname__}"
        call.write_bytes(pickle.dumps((name, arguments, process_group)))
        run_module("tests.support.distributed", [str(call)], world_size, timeout).check()
        results = [Path(folder) / f"result_{rank}.pkl" for rank in range(world_size)]
        return [pickle.loads(path.read_bytes()) for path in results]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(call: Path) -> None:
    name, arguments, process_group = pickle.loads(call.read_bytes())
    module, _, attribute = name.partition(":")
    function = getattr(import_module(module), attribute)
    rank = int(os.environ["RANK"])
    if process_group:
        import torch.distributed as dist

        dist.init_process_group("gloo")
    result = function(*arguments)
    (call.parent / f"result_{rank}.pkl").write_bytes(pickle.dumps(result))
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an orderly shutdown


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
