"""Whether a run lives: its phase, signs of life, how long ranks may wait, what looks wrong in figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from pretrain.config import JobConfig
from pretrain.heartbeat import HeartbeatWriter
from pretrain.lost_ranks import find_peers
from pretrain.runtime import Runtime
from pretrain.spikes import Warnings
from pretrain.watchdog import Watchdog

# In these every rank comes to the next collective soon; else one may work for long while the others wait.
_BRISK = ("training", "validating")


class Health:
    """What the loop calls so that others see how a run is; every rank has one.

    Args:
        config: `config.health` has the limits.
        runtime: ranks, step and folder.
        say: prints a line on the main process.
    """

    def __init__(self, config: JobConfig, runtime: Runtime, say: Callable[[str], None]) -> None:
        self.limits, self.runtime, self.say = config.health, runtime, say
        self.peers = find_peers(runtime)
        self.heartbeat = HeartbeatWriter(runtime.run_dir, config.steps) if runtime.is_main else None
        self.watchdog = Watchdog(runtime.rank)
        self.warnings = Warnings(config.health)
        self.last_sample = ""
        self.now = "starting"
        self.enter("starting")

    def enter(self, phase: str) -> None:
        """Begin a phase (`pretrain.heartbeat.PHASES` or `RESTING`)."""
        self.now = phase
        if self.heartbeat is not None:
            self.heartbeat.phase(phase, self.runtime.step)
        if self.runtime.world_size > 1:
            self.runtime.limit_waits(self._longest_wait())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Be in a phase for a while, then again in the one before."""
        before = self.now
        self.enter(name)
        yield
        self.enter(before)

    def _longest_wait(self) -> float:
        limits = self.limits
        return limits.collective_timeout_seconds if self.now in _BRISK else limits.startup_timeout_seconds

    def waiting_for_data(self, micro_step: int) -> AbstractContextManager[None]:
        """Around the wait for a micro-batch: warns, and ends the job when none comes."""
        runtime, limits = self.runtime, self.limits
        last = f", after sample {self.last_sample}" if self.last_sample else ""
        place = f"micro-batch {micro_step + 1} of {runtime.micro_steps} of step {runtime.step + 1}{last}"
        slow = self.now == "starting" and limits.data_limit_seconds
        return self.watchdog.watch(
            f"waiting for {place}",
            limits.data_warning_seconds,
            limits.startup_timeout_seconds if slow else limits.data_limit_seconds,
            f"no data for {place} within health.data_limit_seconds",
            data=True,
        )

    def stepping(self) -> AbstractContextManager[None]:
        """Around a step: says where this rank is when it takes long, and ends one that the others gave up."""
        longest, step = self._longest_wait(), self.runtime.step + 1
        return self.watchdog.watch(
            f"in step {step}",
            longest / 2,
            1.5 * longest if self.runtime.world_size > 1 else 0,
            f"step {step} took longer than the other ranks wait (health.collective_timeout_seconds)",
        )

    def step_done(self, figures: Mapping[str, float]) -> None:
        """Note a step and look at its losses."""
        if self.now == "starting":
            self.enter("training")
        losses = [value for key, value in figures.items() if key.startswith("loss/")]
        if self.heartbeat is not None:
            self.heartbeat.step(
                self.runtime.step, figures.get("loss/total", statistics.fmean(losses or [0.0]))
            )
        for line in self.warnings.of_step(self.runtime.step, figures):
            self.say(line)

    def look_at_log(self, figures: Mapping[str, float]) -> dict[str, int]:
        """Look at the figures of a log line; returns how many warnings there have been, by kind."""
        for line in self.warnings.of_log(self.runtime.step, figures):
            self.say(line)
        return self.warnings.figures()

    def look_at_validation(self, figures: Mapping[str, float]) -> None:
        """Look at the figures of a validation."""
        for line in self.warnings.of_validation(self.runtime.step, figures):
            self.say(line)
