"""The sign of life of a run: a small file that the main process rewrites, and what it tells who looks."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HEARTBEAT_FILE = "heartbeat.json"
SECONDS_BETWEEN_BEATS = 5.0
# At rest no process is expected behind the file.
PHASES = ("starting", "training", "validating", "saving", "exporting")
RESTING = ("finished", "stopped", "failed")


@dataclass
class Heartbeat:
    """What the file holds; times are seconds since 1970."""

    phase: str
    phase_began: float
    time: float
    started: float
    step: int
    first_step: int
    steps: int
    loss: float | None
    host: str
    pid: int

    @property
    def seconds_per_step(self) -> float | None:
        """Since the start, everything between steps included; None before the first step."""
        done = self.step - self.first_step
        return (self.time - self.started) / done if done > 0 else None

    def process_is_gone(self) -> bool:
        """Whether the process has ended; never on another host, where nobody can tell."""
        return self.host == socket.gethostname() and not os.path.exists(f"/proc/{self.pid}")


class HeartbeatWriter:
    """Rewrites the file at every change of phase, and else every few seconds, whole or not at all."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.path = folder / HEARTBEAT_FILE
        now = time.time()
        host, pid = socket.gethostname(), os.getpid()
        self.beat = Heartbeat("starting", now, now, now, 0, 0, steps, None, host, pid)
        self._written = 0.0

    def phase(self, name: str, step: int) -> None:
        """Enter a phase at a step."""
        now = time.time()
        if name == "training" and self.beat.phase == "starting":
            self.beat.started, self.beat.first_step = now, step
        self.beat.phase, self.beat.phase_began, self.beat.step = name, now, step
        self._write()

    def step(self, step: int, loss: float | None) -> None:
        """Note a step."""
        self.beat.step, self.beat.loss = step, loss
        if time.monotonic() - self._written >= SECONDS_BETWEEN_BEATS:
            self._write()

    def _write(self) -> None:
        self.beat.time = time.time()
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(asdict(self.beat)), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError:  # a full disk must not end a run for a sign of life; the old file then says so
            return
        self._written = time.monotonic()


def read_heartbeat(folder: Path) -> Heartbeat | None:
    """The sign of life in a run folder; None if there is none.

    Raises:
        ValueError: the file is something else.
    """
    path = folder / HEARTBEAT_FILE
    try:
        return Heartbeat(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no heartbeat of a run: {error}; remove it") from error


def state_of(beat: Heartbeat, now: float) -> str:
    """`running`, or `silent` or `dead`, or the end that the run came to (`RESTING`)."""
    if beat.phase in RESTING:
        return beat.phase
    if beat.process_is_gone():
        return "dead"
    # Nothing is heard while a validation, a checkpoint or an export lasts.
    is_silent = beat.phase == "training" and now - beat.time > silence_allowed(beat.seconds_per_step)
    return "silent" if is_silent else "running"


def in_words(beat: Heartbeat, now: float) -> str:
    """One line: whether the run lives, where it is, how long since its last sign, and when it may end."""
    state, pace = state_of(beat, now), beat.seconds_per_step
    words = [f"{state}: {beat.phase}" if state != beat.phase else state]
    words[0] += f" at step {beat.step}/{beat.steps}"
    if beat.loss is not None:
        words.append(f"loss {beat.loss:.4g}")
    words.append(f"last sign {_duration(now - beat.time)} ago by process {beat.pid} on {beat.host}")
    if state == "dead":
        words.append("which is gone")
    elif state == "silent":
        words.append(f"a step takes {_duration(pace)}" if pace else "no step is done yet")
    elif state == "running" and beat.phase != "training":
        words.append(f"{beat.phase} for {_duration(now - beat.phase_began)}")
    if state == "running" and pace:
        words.append(f"about {_duration((beat.steps - beat.step) * pace)} left")
    return ", ".join(words)


def silence_allowed(seconds_per_step: float | None) -> float:
    """Seconds without a sign after which a run in training is called silent: ten steps, at least a minute."""
    return max(60.0, 10 * (seconds_per_step or 60.0))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
