"""The loader around an Energon data set: endless or one pass, exact state, one-line errors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, NoReturn, TypeVar

import torch
from megatron.energon import SavableDataLoader, SavableDataset, WorkerConfig, get_savable_loader

from data_pipeline.errors import DatasetError
from data_pipeline.streams.plain_state import from_plain, to_plain

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STATE_VERSION = 2
_WATCHDOG_SECONDS = 300.0


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
    makes one pass each time it is iterated. The state belongs to the rank that saved it; those of all ranks
    become those of another number of ranks by `redistribute_states`.
    """

    def __init__(
        self,
        build: Callable[[], SavableDataset],
        identity: dict[str, Any],
        *,
        endless: bool = True,
        samples: int = -1,
        unwrap: Callable[[Any], T] | None = None,
    ) -> None:
        """Wrap a data set.

        Args:
            build: Makes the Energon data set; called anew for each pass and each restore.
            identity: Plain values that must be the same when a state is restored (settings, sizes, rank).
            endless: Whether the data set repeats for ever.
            samples: Number of samples in the data set over all ranks, if known.
            unwrap: Applied to each item in the main process.
        """
        self.samples = samples
        self._build = build
        self._identity = identity
        self._endless = endless
        self._unwrap = unwrap
        self._loader: SavableDataLoader | None = None
        self._iterator: Iterator | None = None

    def __iter__(self) -> StreamLoader[T]:
        if not self._endless:
            self.close()
        return self

    def __next__(self) -> T:
        if self._iterator is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*no accelerator is found.*")
                self._iterator = iter(self._open())
        try:
            item = next(self._iterator)
        except DatasetError as error:  # from a worker process it comes with that process's whole traceback
            line = str(error).strip().splitlines()[-1]
            raise DatasetError(line.removeprefix(f"{DatasetError.__module__}.DatasetError: ")) from None
        return self._unwrap(item) if self._unwrap else item

    def _open(self) -> SavableDataLoader:
        if self._loader is None:
            dataset = self._build()
            in_process = dataset.worker_config.num_workers == 0
            self._loader = get_savable_loader(
                dataset,
                # In the trainer's own process collecting garbage is the trainer's business.
                gc_collect_every_n_steps=0 if in_process else 10,
                watchdog_timeout_seconds=None if in_process else _WATCHDOG_SECONDS,
            )
            self._loader.pin_memory = torch.cuda.is_available() and not in_process
        return self._loader

    def save_state(self) -> dict[str, Any]:
        """Return the place in the stream as plain values, for a JSON file.

        Raises:
            ValueError: On a validation loader, which always starts anew.
        """
        self._require_endless()
        return {
            "version": _STATE_VERSION,
            "identity": dict(self._identity),
            "energon": to_plain(self._open().save_state_rank()),
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place; the micro-batches that follow are those that followed when it was saved.

        Raises:
            ValueError: The state is of another version, or was saved with other settings, data or rank.
        """
        self._require_endless()
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"loader state has version {state.get('version')}, expected {_STATE_VERSION}")
        for name, expected in self._identity.items():
            if state["identity"].get(name) != expected:
                raise ValueError(
                    f"loader state was saved with {name}={state['identity'].get(name)}, this loader has "
                    f"{name}={expected}; resume with the same data settings and world size"
                )
        self.close()
        self._open().restore_state_rank(from_plain(state["energon"]))

    def _require_endless(self) -> None:
        if not self._endless:
            raise ValueError(
                "a validation loader starts anew with each pass and has no state to save or restore"
            )

    def close(self) -> None:
        """Stop the worker processes, if any; iterating again starts from the beginning."""
        workers = getattr(self._loader, "_iterator", None)
        if workers is not None:
            # DataLoader has no public way to do so; left to garbage collection it can take 5 s a worker.
            workers._shutdown_workers()
        self._iterator = None
        self._loader = None
