"""The loader of a rank: endless or one pass, exact state for any number of ranks, one-line errors."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, NoReturn, TypeVar

from megatron.energon import SavableDataset, WorkerConfig

from data_pipeline.errors import DatasetError
from data_pipeline.streams.reader import Reader
from data_pipeline.streams.states import STATE_VERSION, furthest_places, states_for
from data_pipeline.streams.turns import Turns

logger = logging.getLogger(__name__)

T = TypeVar("T")


def _sample_name(sample: Any) -> str:
    """Name a sample for an error message by its shard and key, as far as they are known."""
    shard = getattr(sample, "shard", "")
    return f"{shard}{': ' if shard else ''}sample {getattr(sample, '__key__', '?')!r}"


def _stop_at_bad_sample(error: Exception, sample: Any, sources: Any = None) -> NoReturn:
    raise DatasetError(f"{_sample_name(sample)}: {error}") from error


def _skip_bad_sample(error: Exception, sample: Any, sources: Any = None) -> None:
    logger.warning("skipped %s: %s", _sample_name(sample), error)


ON_BAD_SAMPLE: dict[str, Callable[..., None]] = {"stop": _stop_at_bad_sample, "skip": _skip_bad_sample}


def worker_config(
    rank: int, world_size: int, num_workers: int, seed: int, on_bad_sample: str = "stop"
) -> WorkerConfig:
    """Describe this rank to Energon.

    The samples are divided over rank x worker: one rank with two workers reads, in turn, what two ranks with
    one worker each (or none: the rank then reads by itself) read side by side.

    Raises:
        ValueError: `rank` outside `world_size`, or `on_bad_sample` neither "stop" nor "skip".
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 <= rank < world_size = {world_size}")
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise ValueError(f"on_bad_sample is {on_bad_sample!r}, expected one of {sorted(ON_BAD_SAMPLE)}")
    return WorkerConfig(
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        seed_offset=seed,
        global_error_handler=ON_BAD_SAMPLE[on_bad_sample],
    )


def is_training(split: str) -> bool:
    """Whether `split` names the endless, shuffled stream (`train`) rather than one ordered pass (`val`)."""
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected 'train' (endless) or 'val' (one ordered pass)")
    return split == "train"


def require_samples(samples: dict[str, int], config: WorkerConfig) -> None:
    """Raise DatasetError unless every reader (rank x worker) gets a sample of at least one data set.

    `samples` is the number of samples by path.
    """
    readers = config.world_size * max(1, config.num_workers)
    if max(samples.values(), default=0) < readers:
        raise DatasetError(
            f"{', '.join(samples)}: {sum(samples.values())} samples for {readers} readers (ranks x workers), "
            "expected at least one for each; use fewer ranks or workers"
        )


class StreamLoader(Generic[T]):
    """Iterates micro-batches of one rank and saves and restores its place exactly.

    A training loader is endless and goes on where it was, however often it is iterated; a validation loader
    makes one pass each time it is iterated. What each rank saved at the same step can be restored on another
    number of ranks: no sample is lost or comes twice, and a step takes the micro-batches it would have taken.
    """

    def __init__(
        self,
        build: Callable[[WorkerConfig], SavableDataset],
        workers: WorkerConfig,
        identity: dict[str, Any],
        *,
        endless: bool = True,
        samples: int = -1,
    ) -> None:
        """Wrap a data set.

        Args:
            build: Makes the Energon data set of a reader; called anew for each pass and each restore.
            workers: This rank, the number of ranks and of reading processes for each.
            identity: Plain values that must be the same when a state is restored (settings, sizes), none of
                them about ranks or workers.
            endless: Whether the data set repeats for ever.
            samples: Number of samples in the data set over all ranks, if known.
        """
        self.samples = samples
        self.rank, self.world_size = workers.rank, workers.world_size
        self._build = build
        self._workers = workers
        self._identity = identity
        self._endless = endless
        self._readers: dict[int, Reader] = {}  # by turn
        self._waiting: deque[Reader] = deque()  # the next one first
        self._begin_at(self._configured(), 0, {})

    def _configured(self) -> Turns:
        """How a run that begins with these settings deals its micro-batches."""
        return Turns(self.world_size, max(1, self._workers.num_workers))

    def _begin_at(self, turns: Turns, dealt: int, places: dict[int, dict[str, Any]]) -> None:
        """Take the place where `dealt` micro-batches have been dealt to all ranks; `places` are by turn."""
        self._turns, self._first, self._places = turns, dealt, places
        self._taken = 0  # by this rank since then

    def __iter__(self) -> StreamLoader[T]:
        if not self._endless:
            self.close()
        return self

    def __next__(self) -> T:
        if not self._readers:
            self._open()
        while self._waiting:
            try:
                batch = self._waiting[0].batch(self._next_number())
            except StopIteration:
                if self._endless:
                    raise
                self._waiting.popleft()  # its pass is over, that of others may not be
                continue
            except DatasetError as error:  # from a process of its own it comes with a whole traceback
                line = str(error).strip().splitlines()[-1]
                raise DatasetError(line.removeprefix(f"{DatasetError.__module__}.DatasetError: ")) from None
            self._waiting.rotate(-1)
            self._taken += 1
            return batch
        raise StopIteration

    def _next_number(self) -> int:
        """Which of the next reader's batches is this rank's; 0, any, in a pass, where no reader is shared."""
        dealt = self._first + self._taken * self.world_size + self.rank
        return dealt // self._turns.readers if self._endless else 0

    def _open(self) -> None:
        for turn in self._turns.of_rank(self.rank, self.world_size, self._first):
            workers = replace(
                self._workers,
                rank=self._turns.share(turn),
                world_size=self._turns.readers,
                num_workers=min(1, self._workers.num_workers),
            )
            self._readers[turn] = Reader(self._build(workers), self._places.get(turn))
        for reader in self._readers.values():
            reader.start()
        self._waiting = deque(self._readers.values())

    def describe(self) -> str:
        """Return in words how the stream is divided over readers and ranks, once a state is restored."""
        words = self._turns.describe(self.world_size)
        if self._turns != self._configured():
            words += f"; as this run began, with {self._turns.ranks} rank(s) x {self._turns.workers}"
        return f"data: {words}"

    def save_state(self) -> dict[str, Any]:
        """Return the place in the stream as plain values, for a JSON file.

        Raises:
            ValueError: On a validation loader, which always starts anew.
        """
        self._require_endless()
        places = {turn: reader.save() for turn, reader in self._readers.items()} or self._places
        return {
            "version": STATE_VERSION,
            "identity": dict(self._identity),
            "began": {"ranks": self._turns.ranks, "workers": self._turns.workers},
            "rank": self.rank,
            "world_size": self.world_size,
            "taken": self._first + self._taken * self.world_size,
            "readers": [[turn, place] for turn, place in places.items()],
        }

    def restore_states(self, states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Go to a saved place; the micro-batches that follow are those that followed when it was saved.

        Args:
            states: Those that all ranks saved at the same step; on as many ranks this rank's own is enough.

        Returns:
            Those of them that this rank goes on from, by rank.

        Raises:
            ValueError: They are of another version, settings, data, run or step, or some are missing.
        """
        self._require_endless()
        states = states_for(states, self._identity, self.rank, self.world_size)
        self.close()
        self._begin_at(Turns(**states[0]["began"]), states[0]["taken"], furthest_places(states))
        return states

    def _require_endless(self) -> None:
        if not self._endless:
            raise ValueError(
                "a validation loader starts anew with each pass and has no state to save or restore"
            )

    def close(self) -> None:
        """Stop the worker processes, if any; iterating again starts from the beginning."""
        for reader in self._readers.values():
            reader.close()
        self._readers, self._waiting = {}, deque()
        self._begin_at(self._configured(), 0, {})
