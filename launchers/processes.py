"""Commands as subprocesses: the DeepSpeed launcher, threads per process, peak memory, orderly ends."""

import contextlib
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from launchers.errors import UserError

SECONDS_BETWEEN_SAMPLES = 1.5
SECONDS_TO_END = 60  # a trainer finishes its step and writes a checkpoint in this time


@dataclass(frozen=True)
class Finished:
    """How a command went."""

    returncode: int
    seconds: float
    peak_memory_bytes: int  # of all its processes together, shared pages counted once


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def default_ranks(*recipes: str, settings: Sequence[str] = ()) -> int:
    """Ranks a job is started with: one per GPU, or two on the CPU of a machine with two cores or more.

    Fewer where the batch of one of the recipes, with the words of `settings`, does not split over as many.
    """
    import torch

    from pretrain.config import fitting_ranks

    ranks = torch.cuda.device_count() or min(2, available_cores())
    for recipe in recipes:
        ranks = fitting_ranks([f"recipe={recipe}", *settings], ranks)
    return ranks


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_command(module: str, arguments: Sequence[str], ranks: int) -> list[str]:
    """The command that starts `module` on `ranks` ranks of this machine, as a person would type it.

    Raises:
        UserError: CUDA_VISIBLE_DEVICES has too few devices, or names that DeepSpeed's launcher does not take.
    """
    return ["deepspeed", *_devices(ranks), "--module", module, *arguments]


def _devices(ranks: int) -> list[str]:
    """Options for the number of ranks; beside `--num_gpus` DeepSpeed does not heed CUDA_VISIBLE_DEVICES."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible or not torch.cuda.is_available():
        return ["--num_gpus", str(ranks)]
    numbers = [number.strip() for number in visible.split(",")]
    if len(numbers) < ranks or not all(number.isdigit() for number in numbers):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} for {ranks} rank(s): expected a number for each, such as "
            f"{','.join(map(str, range(ranks)))}; or start with torchrun"
        )
    return ["--include", f"localhost:{','.join(numbers[:ranks])}"]


def training_command(words: Sequence[str], ranks: int) -> list[str]:
    """The command that trains with `recipe=NAME key=value ...` on `ranks` ranks of this machine."""
    if ranks == 1:  # without the launcher, which takes seconds to start
        return ["python", "-m", "pretrain.train", *words]
    return deepspeed_command("pretrain.train", words, ranks)


def environment(processes: int) -> dict[str, str]:
    """The environment of a command: the CPU where there is no GPU, cores shared out over its processes."""
    import torch

    env = dict(os.environ)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    env["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))
    # Batches of pictures are new memory each time; in huge pages it takes a fifth less time to decode them.
    env.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
        # In bf16 oneDNN compiles a kernel for every shape: as many as it keeps by itself take 0.5 GiB a rank
        # of shapes that seldom come again.
        env.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    return env


def run(
    command: Sequence[str], processes: int = 1, notice_session: Callable[[int], None] | None = None
) -> Finished:
    """Run a command to its end, output and progress shown as it comes.

    `python`, `dualtoken` and `deepspeed` are those of this environment. SIGINT and SIGTERM are passed on to
    every process of the command as SIGTERM, upon which a training job writes a checkpoint.

    Args:
        command: words as shown to the user.
        processes: how many compute at the same time; they share the cores.
        notice_session: called with the id of the session that all processes of the command belong to.

    Raises:
        KeyboardInterrupt: a signal arrived; the command has ended by then.
    """
    words = list(command)
    if words[0] == "python":
        words[0] = sys.executable
    elif words[0] == "dualtoken":
        words[0:1] = [sys.executable, "-m", "launchers.cli"]
    elif words[0] == "deepspeed":
        # The launcher's default port may be taken by another job; its own log helps nobody here. As a module:
        # the installed script does not start where the environment's path has a space.
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
        words[0:1] = [*launcher, "--master_port", str(free_port())]
    started = time.monotonic()
    with _interruptible():
        # A session of its own, so that a leftover can be found even when this process was killed.
        process = subprocess.Popen(words, env=environment(processes), start_new_session=True)
        if notice_session is not None:
            notice_session(process.pid)
        sampler = _MemorySampler(process.pid)
        try:
            with sampler:
                process.wait()
        except KeyboardInterrupt:
            end_session(process.pid)
            process.wait()
            raise
    # DeepSpeed's launcher can return before its last rank is gone.
    _wait_for_session(process.pid, SECONDS_TO_END)
    return Finished(process.returncode, time.monotonic() - started, sampler.peak)


def session_members(session: int, started_after: float = 0.0) -> list[psutil.Process]:
    """Living processes of a session, other than this one."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if (
                process.pid != os.getpid()
                and os.getsid(process.pid) == session
                and process.create_time() >= started_after
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                members.append(process)
    return members


def end_session(session: int, started_after: float = 0.0) -> int:
    """Ask every process of a session to end, wait, end the rest by force; returns how many there were."""
    members = session_members(session, started_after)
    for process in members:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(members, timeout=SECONDS_TO_END)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    return len(members)


def _wait_for_session(session: int, seconds: float) -> None:
    psutil.wait_procs(session_members(session), timeout=seconds)


@contextlib.contextmanager
def only_one(folder: Path, what: str, option: str) -> Iterator[None]:
    """Hold the lock of a folder while entered.

    Args:
        folder: whose `.lock` is taken; the system gives it back however this process ends.
        what: is at work, for the error.
        option: that names another folder, for the error.

    Raises:
        UserError: another process holds it.
    """
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another {what} is at work in {folder}: wait for it or use {option}") from None
        yield


@contextlib.contextmanager
def _interruptible():
    """Let SIGTERM raise KeyboardInterrupt, as SIGINT does."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _MemorySampler(threading.Thread):
    """Watches the memory of a process and its descendants while it is entered."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._root = psutil.Process(pid)
        self._stop_event = threading.Event()

    def __enter__(self) -> "_MemorySampler":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop_event.set()
        self.join()
        if not self.peak:  # it ended before anybody looked: no child so far held more than this
            self.peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024

    def run(self) -> None:
        most_resident = 0
        while True:
            # Proportional sizes cost the kernel a walk over all pages: only where resident sizes have grown.
            resident = tree_memory(self._root, lambda process: process.memory_info().rss)
            if resident > most_resident:
                most_resident = 1.02 * resident
                self.peak = max(self.peak, tree_memory(self._root, proportional_size))
            if self._stop_event.wait(SECONDS_BETWEEN_SAMPLES):
                return


def tree_memory(root: psutil.Process, size: Callable[[psutil.Process], int]) -> int:
    """Sum of a size in bytes over a process and its descendants."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += size(process)
    return total


def proportional_size(process: psutil.Process) -> int:
    """Bytes of a process, each shared page divided by how many share it."""
    return process.memory_full_info().pss
