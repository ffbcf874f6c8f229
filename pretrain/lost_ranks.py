"""What a rank says when it ends by accident: its traceback, or one line where another rank is to blame."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from typing import NoReturn

import psutil
import torch.distributed as dist

from pretrain.runtime import Runtime

# What gloo, NCCL and torch's store say where a peer has gone or does not come.
_LOST = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|remote process|socket closed|peer|NCCL|watchdog",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)
SECONDS_TO_GO = 2.0
_WORKER = re.compile(r"DataLoader worker .*")


@dataclass(frozen=True)
class Peer:
    """A process of the job."""

    rank: int
    host: str
    pid: int

    def is_gone(self) -> bool:
        """Whether it has ended; only of this host can that be told."""
        if self.host != socket.gethostname():
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def find_peers(runtime: Runtime) -> list[Peer]:
    """All processes of the job; every rank has to call."""
    return runtime.from_all(Peer(runtime.rank, socket.gethostname(), os.getpid()))


def lost_worker(error: BaseException) -> str:
    """What torch says of a reading process that died; empty for other errors.

    It says so by a signal handler, so wherever the main thread happens to be.
    """
    match = _WORKER.search(str(error)) if isinstance(error, RuntimeError) else None
    return match.group() if match else ""


def lost_peer(error: BaseException, peers: list[Peer]) -> str:
    """One line, if another rank's end or silence is what the error comes from; else nothing."""
    text = " ".join(str(error).split())
    from_group = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|nccl|c10d|ProcessGroup", text, re.IGNORECASE)
    )
    if not from_group or not (_LATE.search(text) or _LOST.search(text)):
        return ""
    # A connection closes a little before its process is gone.
    deadline = time.monotonic() + (0 if _LATE.search(text) else SECONDS_TO_GO)
    while not (gone := [peer for peer in peers if peer.is_gone()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    if gone:
        ranks = ", ".join(f"{peer.rank} (process {peer.pid})" for peer in gone)
        return f"lost rank {ranks}, which has ended; see the first traceback above, if it left one"
    if _LATE.search(text):
        return (
            f"another rank did not come to a collective in time; see what each rank says above ({text[:120]})"
        )
    return f"lost another rank; see the first traceback above ({text[:120]})"


def end_by(error: BaseException, rank: int, step: int, peers: list[Peer]) -> NoReturn:
    """End this process, and so the job, after an error that nobody expected.

    No orderly shutdown: others may be waiting in a collective, and the interpreter's end would wait for them.
    """
    if line := lost_peer(error, peers):
        sys.stderr.write(f"error: rank {rank}: after step {step}: {line}\n")
    else:
        lines = "".join(traceback.format_exception(error))
        sys.stderr.write(f"rank {rank}: after step {step}:\n{lines}")
    sys.stderr.flush()
    os._exit(1)
