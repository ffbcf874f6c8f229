"""The loader of a rank: endless or one pass, exact state for any number of ranks, one-line errors."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Generic, Protocol, TypeVar

from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.metadataset.loader_interface import LoadedDataset

from data_pipeline.errors import DatasetError
from data_pipeline.shards.reader import PreparedShards
from data_pipeline.streams.dealing import Dealing
from data_pipeline.streams.reader import Reader
from data_pipeline.streams.states import STATE_VERSION, furthest_places, states_for

T = TypeVar("T")

_MOST_OPEN_FILES = 1 << 16


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


class Weighted(Protocol):
    """A folder of a blend."""

    @property
    def path(self) -> str:
        """Folder or address of shards."""

    @property
    def weight(self) -> float:
        """How often it is drawn, relative to the others."""


W = TypeVar("W", bound=Weighted)


def drawn_entries(blend: Sequence[W]) -> list[W]:
    """Return the entries with a weight above 0; ValueError if there is none, or a weight below 0."""
    for entry in blend:
        if not entry.weight >= 0:
            raise ValueError(f"{entry.path}: weight is {entry.weight}, expected 0 or more")
    entries = [entry for entry in blend if entry.weight > 0]
    if not entries:
        raise ValueError(
            "the blend is empty or every weight of the blend is 0; expected an entry with a weight above 0"
        )
    return entries


def load_blend(
    entries: Sequence[Weighted], workers: WorkerConfig, training: bool, slice_length: int, on_bad_sample: str
) -> list[LoadedDataset]:
    """Make the data sets of a blend, for Energon to draw from by their weights."""
    _allow_open_files()
    skip = on_bad_sample == "skip"
    return [
        LoadedDataset(
            dataset=PreparedShards(entry.path, workers, training, slice_length, index, skip_unreadable=skip),
            weight=entry.weight,
        )
        for index, entry in enumerate(entries)
    ]


def _allow_open_files() -> None:
    """Let this process, and those it starts, have as many files open as it may, up to 65536.

    Each folder keeps some shards open, and the usual limit of 1024 is that of about 60 folders.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class StreamLoader(Generic[T]):
    """Iterates micro-batches of one rank and saves and restores its place exactly.

    A training loader is endless and goes on where it was, however often it is iterated; a validation loader
    makes one pass each time it is iterated. What each rank saved at the same step can be restored on another
    number of ranks: no sample is lost or comes twice, and a step takes the samples it would have taken.
    """

    def __init__(
        self,
        build: Callable[[WorkerConfig, int], SavableDataset],
        workers: WorkerConfig,
        identity: dict[str, Any],
        *,
        micro_batch_size: int = 1,
        join: Callable[[list[tuple[T, slice]]], T] | None = None,
        endless: bool = True,
        samples: int = -1,
    ) -> None:
        """Wrap a data set.

        Args:
            build: Makes the Energon data set of a reader, with batches of a size; called anew for each pass
                and each restore.
            workers: This rank, the number of ranks and of reading processes for each.
            identity: Plain values that must be the same when a state is restored (settings, sizes), none of
                them about ranks, workers or micro-batches.
            micro_batch_size: Samples in a micro-batch; the last ones of a pass may be smaller.
            join: Makes a micro-batch of parts of others; needed where a state of another size is restored.
            endless: Whether the data set repeats for ever.
            samples: Number of samples in the data set over all ranks, if known.
        """
        self.samples = samples
        self.rank, self.world_size = workers.rank, workers.world_size
        self._build = build
        self._workers = workers
        self._identity = identity
        self._size = micro_batch_size
        self._join = join
        self._endless = endless
        self._readers: dict[int, Reader] = {}  # by turn, in the order in which they are needed
        self._begin_at(self._configured(), 0, {})

    def _configured(self) -> Dealing:
        """How a run that begins with these settings deals its samples."""
        return Dealing(self.world_size, max(1, self._workers.num_workers), self._size)

    def _begin_at(self, dealing: Dealing, dealt: int, places: dict[int, dict[str, Any]]) -> None:
        """Take the place where `dealt` samples have been dealt to all ranks; `places` of readers by turn."""
        self._dealing, self._dealt, self._places = dealing, dealt, places

    def __iter__(self) -> StreamLoader[T]:
        if not self._endless:
            self.close()
        return self

    def __next__(self) -> T:
        if not self._readers:
            self._open()
        try:
            return self._next_of_stream() if self._endless else self._next_of_pass()
        except DatasetError as error:  # from a process of its own it comes with a whole traceback
            line = str(error).strip().splitlines()[-1]
            raise DatasetError(line.removeprefix(f"{DatasetError.__module__}.DatasetError: ")) from None

    def _next_of_stream(self) -> T:
        parts = self._dealing.parts(self._dealt + self.rank * self._size, self._size)
        batches = [self._readers[part.turn].batch(part.number, again=not part.whole) for part in parts]
        self._dealt += self.world_size * self._size
        if len(parts) == 1 and parts[0].whole:
            return batches[0]
        assert self._join is not None
        return self._join([(batch, slice(part.start, part.stop)) for batch, part in zip(batches, parts)])

    def _next_of_pass(self) -> T:
        while self._waiting:
            try:
                batch = self._waiting[0].batch(0)
            except StopIteration:
                self._waiting.popleft()  # the pass of this reader is over, that of others may not be
                continue
            self._waiting.rotate(-1)
            return batch
        raise StopIteration

    def _open(self) -> None:
        dealing = self._dealing
        for turn in self._turns():
            workers = replace(
                self._workers,
                rank=dealing.share(turn),
                world_size=dealing.readers,
                num_workers=min(1, self._workers.num_workers),
            )
            self._readers[turn] = Reader(self._build(workers, dealing.batch_size), self._places.get(turn))
        for reader in self._readers.values():
            reader.start()
        self._waiting = deque(self._readers.values())  # in a pass, the next one first

    def _turns(self) -> list[int]:
        """The turns of the readers that this rank takes from."""
        first = self._dealt + self.rank * self._size
        return self._dealing.turns(first, self._size, self.world_size * self._size)

    def describe(self) -> str:
        """Return in words how the samples are divided over readers and ranks, once a state is restored."""
        dealing, own = self._dealing, len(self._turns())
        words = f"data: {dealing.readers} reader(s), {own} for each of {self.world_size} rank(s)"
        if own * self.world_size > dealing.readers:
            words += ", shared: what a rank reads is used in part by it and in part by others"
        if dealing != self._configured():
            began = f"{dealing.ranks} rank(s) x {dealing.workers} of batches of {dealing.batch_size}"
            words += f"; as this run began, {began}"
        return words

    def save_state(self) -> dict[str, Any]:
        """Return the place in the stream as plain values, for a JSON file.

        Raises:
            ValueError: On a validation loader, which always starts anew.
        """
        return self.save_earlier_state(0)

    def save_earlier_state(self, unused: int) -> dict[str, Any]:
        """Return, as `save_state`, the place before the last `unused` micro-batches, which were taken ahead.

        Whoever goes on from it reads some samples again, mostly a minute's at most, on the way there.

        Raises:
            ValueError: On a validation loader, which always starts anew.
        """
        self._require_endless()
        places = self._places
        dealt = self._dealt - unused * self.world_size * self._size
        if self._readers:
            number = self._dealing.number
            places = {turn: it.save(number(turn, dealt)) for turn, it in self._readers.items()}
        return {
            "version": STATE_VERSION,
            "identity": dict(self._identity),
            "began": asdict(self._dealing),
            "rank": self.rank,
            "world_size": self.world_size,
            "dealt": dealt,
            "readers": [[turn, place] for turn, place in places.items()],
        }

    def restore_states(self, states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Go to a saved place; the samples that follow are those that followed when it was saved.

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
        self._begin_at(Dealing(**states[0]["began"]), states[0]["dealt"], furthest_places(states))
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
        self._readers = {}
        self._begin_at(self._configured(), 0, {})
