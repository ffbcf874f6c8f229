"""Which samples each micro-batch of a run holds and who reads them, on any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of a reader's batch, `start` to `stop`; `whole` if it is all of it."""

    turn: int
    """Of the reader."""
    number: int
    """Of its batch, from 0."""
    start: int
    stop: int
    whole: bool


@dataclass(frozen=True)
class Dealing:
    """How the samples of a run are dealt; fixed when it begins, whatever its ranks become.

    A run has `ranks` x `workers` *readers*, each with its own share of the samples, of which it makes
    batches. Batch by batch the readers have their turns, and what they give is one sequence of samples. The
    micro-batches of all ranks take from it one after another, so a step takes the same samples on any number
    of ranks, in micro-batches of any size.
    """

    ranks: int
    """Number of ranks that the run began with."""
    workers: int
    """Readers of each of them, at least 1."""
    batch_size: int
    """Samples in a reader's batch: the size of the micro-batches the run began with."""

    @property
    def readers(self) -> int:
        """Number of readers."""
        return self.ranks * self.workers

    def share(self, turn: int) -> int:
        """Return which share of the samples is that of the reader with this turn.

        At first a rank takes from its own readers in turn, and their shares lie one after another.
        """
        return turn % self.ranks * self.workers + turn // self.ranks

    def number(self, turn: int, first: int) -> int:
        """Return the first of a reader's batches that has samples at `first` of the sequence or behind."""
        return -((turn - first // self.batch_size) // self.readers)

    def parts(self, first: int, size: int) -> list[Part]:
        """Return what a micro-batch of `size` samples from `first` of the sequence on is made of."""
        parts = []
        for batch in range(first // self.batch_size, -(-(first + size) // self.batch_size)):
            begin = batch * self.batch_size
            start, stop = max(first - begin, 0), min(first + size - begin, self.batch_size)
            whole = stop - start == self.batch_size
            parts.append(Part(batch % self.readers, batch // self.readers, start, stop, whole))
        return parts

    def turns(self, first: int, size: int, step: int) -> list[int]:
        """Return, in order, whose batches micro-batches at `first`, `first + step`, ... are made of."""
        round_of_all = self.readers * self.batch_size
        count = round_of_all // math.gcd(round_of_all, step)
        numbers = range(first, first + count * step, step)
        return list(dict.fromkeys(part.turn for at in numbers for part in self.parts(at, size)))
