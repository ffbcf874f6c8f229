"""A thread that says where a rank stands when it waits too long, and ends it when nobody will."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil


@dataclass
class _Wait:
    """What the main thread does now, and for how long it may."""

    what: str
    began: float
    warn_after: float  # seconds; doubled after each warning
    limit: float  # seconds; 0 for none
    explain: Callable[[], str]
    failure: str


class Watchdog:
    """Watches the main thread of one rank: `with watchdog.watch(...)` around what may take too long.

    Args:
        rank: names the lines.
        end: ends the process after its last line.
    """

    def __init__(self, rank: int, end: Callable[[], None] = lambda: os._exit(1)) -> None:
        self.rank = rank
        self._end = end
        self._wait: _Wait | None = None
        self._main = threading.main_thread().ident
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    @contextmanager
    def watch(
        self, what: str, warn_after: float, limit: float, failure: str, data: bool = False
    ) -> Iterator[None]:
        """Warn after `warn_after` seconds (0: never), at twice that and so on; end the process after `limit`.

        Args:
            what: the activity, for the warnings.
            warn_after: seconds.
            limit: seconds; 0 for none.
            failure: what the last line says.
            data: whether it is data that is waited for: then lines tell of the workers, else of the code.
        """
        explain = describe_workers if data else self.place
        outer, self._wait = self._wait, _Wait(what, time.monotonic(), warn_after, limit, explain, failure)
        try:
            yield
        finally:
            self._wait = outer

    def place(self) -> str:
        """Where the main thread is: the innermost line, and the innermost one outside of libraries."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "the main thread has ended"
        lines = traceback.extract_stack(frame)
        own = [
            line
            for line in lines
            if "site-packages" not in line.filename and "/lib/python" not in line.filename
        ]
        words = [f"{line.filename}:{line.lineno} {line.name}" for line in (lines[-1], *own[-1:])]
        return f"at {' from '.join(dict.fromkeys(words))}"

    def _look(self) -> None:
        while True:
            time.sleep(0.25)
            wait = self._wait
            if wait is None:
                continue
            waited = time.monotonic() - wait.began
            if wait.limit and waited >= wait.limit:
                self._say(f"error: rank {self.rank}: {wait.failure} ({waited:.0f} s); {wait.explain()}")
                self._end()
                return
            if wait.warn_after and waited >= wait.warn_after:
                wait.warn_after *= 2
                self._say(
                    f"warning: rank {self.rank} has been {wait.what} for {waited:.0f} s; {wait.explain()}"
                )

    @staticmethod
    def _say(line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def describe_workers() -> str:
    """The processes that read data for this one, with what each of them does."""
    words = []
    for worker in multiprocessing.active_children():
        try:
            process = psutil.Process(worker.pid)
            words.append(f"pid {worker.pid} {process.status()}, {sum(process.cpu_times()[:2]):.0f} s of CPU")
        except psutil.Error:
            words.append(f"pid {worker.pid} gone")
    return f"data workers: {'; '.join(words)}" if words else "this rank reads its data by itself"
