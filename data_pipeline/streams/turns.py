"""Whose turn it is: which reader each micro-batch of a run comes from, on any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Turns:
    """How the micro-batches of a run are dealt; fixed when it starts, whatever its ranks become.

    A run has `ranks` x `workers` *readers*, each with its own share of the samples. The micro-batches of all
    ranks are one sequence: number t is batch t // readers of the reader that has turn t % readers. Ranks take
    from it in turn, so that a step takes the same micro-batches on any number of ranks.
    """

    ranks: int
    """Number of ranks that the run began with."""
    workers: int
    """Readers of each of them, at least 1."""

    @property
    def readers(self) -> int:
        """Number of readers."""
        return self.ranks * self.workers

    def share(self, turn: int) -> int:
        """Return which share of the samples is that of the reader with this turn.

        At first a rank takes from its own readers in turn, and their shares lie one after another.
        """
        return turn % self.ranks * self.workers + turn // self.ranks

    def of_rank(self, rank: int, world_size: int, taken: int = 0) -> list[int]:
        """Return the turns a rank waits for, in its order, where `taken` micro-batches are dealt already."""
        period = self.readers // math.gcd(self.readers, world_size)
        return [(taken + rank + step * world_size) % self.readers for step in range(period)]

    def describe(self, world_size: int) -> str:
        """Return in words how the readers are divided over `world_size` ranks."""
        common = math.gcd(self.readers, world_size)
        words = f"{self.readers} reader(s), {self.readers // common} for each of {world_size} rank(s)"
        if world_size > common:
            words += f", each read by {world_size // common} of them, which use its batches in turn"
        return words
