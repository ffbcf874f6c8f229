"""One reader: an Energon loader of one share of the samples, in this process or in one of its own."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from megatron.energon import SavableDataset, WorkerConfig, get_savable_loader
from megatron.energon.savable_loader import SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState
from torch.utils.data import DataLoader

from data_pipeline.errors import DatasetError
from data_pipeline.streams.plain_state import from_plain, to_plain

logger = logging.getLogger(__name__)

_WATCHDOG_SECONDS = 300.0
_KEEP_SECONDS = 60.0  # between the states that are kept; to go on, as much may have to be read again
_KEPT = 8  # states: more than what a process has read ahead and what was handed out but not used
_BEGINNING: dict[str, Any] = {"batches": 0, "dataset": None}


def _sample_name(sample: Any) -> str:
    """Name a sample for an error message by its shard and key, as far as they are known."""
    shard = getattr(sample, "shard", "")
    return f"{shard}{': ' if shard else ''}sample {getattr(sample, '__key__', '?')!r}"


def _stop_at_bad_sample(error: Exception, sample: Any, sources: Any = None) -> NoReturn:
    raise DatasetError(f"{_sample_name(sample)}: {error}") from error


def _skip_bad_sample(error: Exception, sample: Any, sources: Any = None) -> None:
    if isinstance(error, DatasetError):  # of no single sample
        _stop_at_bad_sample(error, sample)
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


def _begin_process(begin: Callable[[int], None], worker: int) -> None:
    """Begin a reading process: SIGTERM ends it only if the process that it reads for sends it.

    Launchers send SIGTERM to all processes of a job, of which the trainer makes a checkpoint: it needs the
    reader to finish its step, and to tell its place.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_by_signal_of, args=(os.getppid(),), daemon=True).start()
    begin(worker)


def _end_by_signal_of(process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)


class Reader:
    """Yields the batches of a data set by their number.

    A saved place is the same whether the data set was read in this process or in one of its own, and can be
    gone on from either way.
    """

    def __init__(self, dataset: SavableDataset, place: dict[str, Any] | None = None) -> None:
        """Read a data set whose worker config has 0 workers (in this process) or 1, from a saved place on."""
        self._in_process = dataset.worker_config.num_workers == 0
        self._loader = get_savable_loader(
            dataset,
            checkpoint_every_sec=_KEEP_SECONDS,
            n_checkpoints=_KEPT,
            # In the trainer's own process collecting garbage is the trainer's business.
            gc_collect_every_n_steps=0 if self._in_process else 10,
            watchdog_timeout_seconds=None if self._in_process else _WATCHDOG_SECONDS,
        )
        self._loader.pin_memory = torch.cuda.is_available() and not self._in_process
        self._loader.worker_init_fn = partial(_begin_process, self._loader.worker_init_fn)
        self._loader.generator = torch.Generator()  # else torch draws a seed from the trainer's own
        self._place = place or _BEGINNING
        self._batches: int = self._place["batches"]  # that were handed out or dropped
        self._held: tuple[int, Any] | None = None  # batch `number`, to be used again
        self._kept = deque[tuple[int, FlexState]](maxlen=_KEPT)  # states before batches, of this process
        self._kept_at = time.monotonic()
        self._iterator: Iterator[tuple[int, int, Any]] | None = None
        if self._place["dataset"] is not None:
            self._go_to_place()

    def start(self) -> None:
        """Start reading ahead, if in a process of its own."""
        if self._iterator is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*no accelerator is found.*")
                # Not Energon's own iterator, which starts its process when the first batch is waited for:
                # several readers would start one after another.
                self._iterator = DataLoader.__iter__(self._loader)

    def batch(self, number: int, again: bool = False) -> Any:
        """Return the batch with this number, or the next if that is later; those before it are dropped.

        One that was read to be used `again` can be asked for, and its place saved, until the next is read.
        """
        if self._held is not None and self._held[0] == number:
            return self._held[1]
        self.start()
        assert self._iterator is not None
        while True:
            if self._in_process and (again or time.monotonic() - self._kept_at >= _KEEP_SECONDS):
                self._kept.append((self._batches, self._loader.dataset.save_state()))
                self._kept_at = time.monotonic()
            _, index, batch = next(self._iterator)
            self._batches = index + 1
            if index >= number:
                self._held = (index, batch) if again else None
                return batch

    def save(self, number: int) -> dict[str, Any]:
        """Return the place of the batch with this number as plain values, or one before it."""
        if self._iterator is None:
            return self._place
        batches = min(number, self._batches)
        if not self._in_process:
            # The process reads ahead, and keeps a few states, some from before what it handed out last.
            (kept,) = self._loader._worker_command("get_checkpoint", [batches - 1])
            if kept.state is None:  # the process has started and has not begun to read
                return self._place
            state, batches = kept.state.dataset_state, kept.state.sample_index
        elif batches == self._batches:
            state = self._loader.dataset.save_state()
        else:
            earlier = [kept for kept in self._kept if kept[0] <= batches]
            if not earlier:
                return self._place
            batches, state = earlier[-1]
        # Without the outermost wrapper, which is another in this process and in one of its own.
        return {"batches": batches, "dataset": to_plain(state["datasets"][0])}

    def _go_to_place(self) -> None:
        batches, dataset = self._place["batches"], from_plain(self._place["dataset"])
        outermost = self._loader.dataset if self._in_process else self._loader.dataset.dataset
        state = FlexState(__class__=type(outermost).__name__, datasets=[dataset], _sample_index=batches)
        if self._in_process:
            self._loader.dataset.restore_state(state)
            return
        # No state of the global random generators: nothing in a stream draws from them.
        whole = SavableDatasetState(rng=None, dataset_state=state, sample_index=batches)
        self._loader.dataset.restore_checkpoint(
            [SavableDatasetCheckpoint(state=whole, offset=0)], worker_offset=0
        )

    def close(self) -> None:
        """Stop the reader's process, if it has one."""
        workers = getattr(self._loader, "_iterator", None)
        if workers is not None:
            # DataLoader has no public way to do so; left to garbage collection it can take 5 s a worker.
            workers._shutdown_workers()
