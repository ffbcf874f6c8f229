"""Warnings of a run that still goes: losses and gradients out of their range, what died or collapsed."""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Mapping
from statistics import median

from pretrain.config import HealthConfig

# Observations that make up the recent range. Of log lines fewer: a trend over them would widen it.
STEPS, LOGS, LEAST = 100, 30, 20
LOGS_UNTIL_DEAD = 5
_TO_SIGMA = 1.4826  # of the median absolute deviation of a normal distribution
_USAGE = re.compile(r"codebook_(\w+)/usage_(\d+)")


class RecentRange:
    """The last values of a figure, and how far out a new one is.

    Median and median absolute deviation: a few spikes among the values do not widen the range.
    """

    def __init__(self, size: int) -> None:
        self.values: deque[float] = deque(maxlen=size)

    def deviations_above(self, value: float, least: float) -> float:
        """How many robust deviations (at least `least` each) `value` is above the median; then adds it."""
        result = 0.0
        if len(self.values) >= LEAST:
            middle = median(self.values)
            spread = _TO_SIGMA * median(abs(other - middle) for other in self.values)
            result = (value - middle) / max(spread, least)
        self.values.append(value)
        return result


class Warnings:
    """Says once per event what looks wrong in figures that are on the host anyhow, and counts the events."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._ranges: dict[str, RecentRange] = {}
        self._losses: set[str] = set()
        self._lasting: set[str] = set()  # events that have been told and go on
        self._dead_logs: Counter[str] = Counter()

    def of_step(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Lines about the losses of one step."""
        losses = {key: value for key, value in figures.items() if key.startswith("loss/")}
        if losses.keys() != self._losses:  # a loss sets in, the sum of all jumps
            self._ranges.clear()
            self._losses = set(losses)
        chosen = {key: losses[key] for key in ("loss/total",) if key in losses} or losses
        lines = []
        for key, value in chosen.items():
            if line := self._spike("loss_spike", step, key, value, value):
                lines.append(line)
                self.counts[f"loss_spike/{key.removeprefix('loss/')}"] += 1
        return lines

    def of_log(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Lines about what is looked at where the log is written: gradient norms and codebooks."""
        lines = []
        for key, value in figures.items():
            if key.startswith("gradient_norm") and value > 0:  # norms vary by factors: in logarithms
                lines.append(self._spike("gradient_spike", step, key, value, math.log(value)))
            elif match := _USAGE.fullmatch(key):
                lines.append(self._dead(step, key, value, *match.groups()))
        return [line for line in lines if line]

    def of_validation(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Lines about a vision tower that trains (`pretrain.tower_collapse`)."""
        if "tower/collapsed" not in figures:
            return []
        line = (
            f"warning: step {step}: the vision tower has collapsed: effective rank "
            f"{figures['tower/effective_rank']:.4g}, {figures['tower/rank_share']:.1%} of the start's, mean "
            f"cosine to the start's features {figures['tower/cosine']:.3g}; expected "
            f"{self.config.tower_rank:.0%} and {self.config.tower_cosine:g} or more; lower its rate "
            "(optimizer.lr_scales)"
        )
        line = self._event("tower_collapse", "tower", bool(figures["tower/collapsed"]), line)
        return [line] if line else []

    def figures(self) -> dict[str, int]:
        """Events so far since the start, by kind, spikes by loss too; nothing before the first."""
        return {f"warnings/{kind}": count for kind, count in self.counts.items()}

    def _spike(self, kind: str, step: int, key: str, value: float, position: float) -> str:
        if not self.config.spike or not math.isfinite(position):
            return ""
        is_log = kind == "gradient_spike"
        recent = self._ranges.setdefault(key, RecentRange(LOGS if is_log else STEPS))
        middle = median(recent.values) if recent.values else position
        least = 0.1 if is_log else 0.02 * abs(middle)  # one that hardly varies has no spike of some percent
        deviations = recent.deviations_above(position, least or math.inf)
        usual = math.exp(middle) if is_log else middle
        line = (
            f"warning: step {step}: {key} {value:.4g}, {deviations:.0f} deviations above {usual:.4g}, the "
            f"median of the last {len(recent.values)}"
        )
        return self._event(kind, key, deviations > self.config.spike, line)

    def _dead(self, step: int, key: str, usage: float, branch: str, depth: str) -> str:
        threshold = self.config.dead_codebook_usage
        self._dead_logs[key] = self._dead_logs[key] + 1 if usage < threshold else 0
        line = (
            f"warning: step {step}: {branch} codebook, depth {depth}: {usage:.2%} of the codes in use, under "
            f"{threshold:.2%} for {LOGS_UNTIL_DEAD} logs"
        )
        return self._event("dead_codebook", key, self._dead_logs[key] >= LOGS_UNTIL_DEAD, line)

    def _event(self, kind: str, key: str, is_on: bool, line: str) -> str:
        """The line, where the event begins."""
        begins = is_on and key not in self._lasting
        self._lasting.add(key) if is_on else self._lasting.discard(key)
        if not begins:
            return ""
        self.counts[kind] += 1
        return line
