"""Time by part of a step, by events on a GPU and by the clock on a CPU; the same parts in a trace."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.profiler import record_function

# In the order of a step. `ranks` is the collective of the figures: mostly the wait for the slowest rank.
PARTS = ("data", "forward", "backward", "ranks", "optimizer")


class _Span(NamedTuple):
    part: str
    begin: torch.cuda.Event
    end: torch.cuda.Event


class StepClock:
    """Adds up the seconds of each part; nobody waits for the device while it runs.

    On a GPU a part lasts from where the device comes to its begin to where it comes to its end: `data` is the
    time that it stood idle, not the time that the host waited. The events are read when the device has
    passed them.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.waited = 0.0
        """Seconds that the host spent in the part `data` since the last `pop`."""
        self._open: list[tuple[str, float, torch.cuda.Event | None, record_function] | None] = []
        self._spans: deque[_Span] = deque()
        self._seconds: dict[str, float] = defaultdict(float)
        self._in_step = True

    def begin(self, part: str) -> None:
        """Begin a part; parts do not overlap."""
        if not self._in_step:
            self._open.append(None)
            return
        span = record_function(part)
        span.__enter__()
        self._open.append((part, time.perf_counter(), _recorded_event() if self._on_gpu else None, span))

    def end(self) -> None:
        """End the part that was begun last."""
        begun = self._open.pop()
        if begun is None:
            return
        part, began, event, span = begun
        seconds = time.perf_counter() - began
        if part == "data":
            self.waited += seconds
        if event is None:
            self._seconds[part] += seconds
        else:
            self._spans.append(_Span(part, event, _recorded_event()))
        span.__exit__(None, None, None)

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Around a part."""
        self.begin(part)
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def outside(self, name: str) -> Iterator[None]:
        """Around what is no part of a step, such as a validation: a range of this name, and no parts."""
        self._in_step = False
        try:
            with record_function(name):
                yield
        finally:
            self._in_step = True

    def collect(self) -> None:
        """Read the events that the device has passed."""
        while self._spans and self._spans[0].end.query():
            span = self._spans.popleft()
            self._seconds[span.part] += span.begin.elapsed_time(span.end) / 1000

    def wait(self) -> None:
        """Wait until the device has done all that it was given to do."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def pop(self) -> dict[str, float]:
        """Seconds by part since the last call, of all `PARTS`; waits for the device up to the last part."""
        if self._spans:
            self._spans[-1].end.synchronize()
            self.collect()
        seconds = {part: self._seconds[part] for part in PARTS}
        self._seconds.clear()
        self.waited = 0.0
        return seconds


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
