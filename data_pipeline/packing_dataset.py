"""Best-fit packing as an Energon data set whose open packs are part of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.energon import Sample, SavableDataset, WorkerConfig, edataclass
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from data_pipeline.errors import DatasetError
from data_pipeline.packing import OpenBins
from dualtoken.sequence import PackedBatch, TokenizedDocument

_MOST_LEFT_OUT_IN_A_ROW = 100_000


@edataclass
class DocumentSample(Sample):
    """A tokenized document of a blend entry, or the reason why a sample made none."""

    entry: int
    document: TokenizedDocument | None = None
    reason: str = ""


@dataclass
class Pack:
    """A pack, the blend entry of each of its documents, and what was left out since the pack before.

    `batch` is None at the end of a pass, where samples were left out after its last pack.
    """

    batch: PackedBatch | None
    entries: list[int]
    left_out: list[tuple[str, str]]
    """(key, reason)."""


class PackingDataset(BaseWrapperDataset[DocumentSample, Pack]):
    """Packs documents online by best fit.

    Energon's own packing empties its whole buffer at a time, the last packs of which are then badly filled;
    here packs stay open until they are full or make room. Documents in open packs are saved as restore keys
    and read again, so that a restored stream goes on with the same packs.
    """

    _savable_fields = ("_samples", "_numbers", "_bins", "_closed", "_next_number", "_left_out")

    def __init__(
        self,
        dataset: SavableDataset[DocumentSample],
        pack: Callable[[list[TokenizedDocument]], PackedBatch],
        context_length: int,
        open_packs: int,
        *,
        worker_config: WorkerConfig,
    ) -> None:
        """Wrap a stream of documents, none longer than `context_length`; `pack` makes the batch."""
        super().__init__(dataset, worker_config=worker_config)
        self.pack = pack
        self.context_length = context_length
        self.open_packs = open_packs
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Forget all open packs."""
        self._samples: SavableSampleBuffer[DocumentSample] = SavableSampleBuffer(
            self.dataset, worker_config=self.worker_config
        )
        self._numbers: list[int] = []  # of the samples in the buffer, in the order of the buffer
        self._bins: list[list[int]] = []
        self._closed: list[list[int]] = []
        self._next_number = 0
        self._left_out: list[tuple[str, str]] = []

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Return the number of documents, as the number of packs is not known before they are made."""
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[Pack]:
        self._samples.worker_start()
        bins = self._restored_bins()
        yield from self._closed_packs()
        for sample in self.dataset:
            if sample.document is None:
                self._left_out.append((sample.__key__, sample.reason))
                if len(self._left_out) == _MOST_LEFT_OUT_IN_A_ROW:
                    raise DatasetError(
                        f"{len(self._left_out)} samples in a row made no document; the last: {sample.reason}"
                    )
                continue
            self._samples.append(sample)
            self._numbers.append(self._next_number)
            bins.add(self._next_number, len(sample.document))
            self._next_number += 1
            yield from self._closed_packs()
        bins.flush()
        yield from self._closed_packs()
        if self._left_out:
            left_out, self._left_out = self._left_out, []
            yield Pack(None, [], left_out)

    def _restored_bins(self) -> OpenBins:
        """Return the bins; `_bins` and `_closed` are its own lists, so that saving them saves the bins."""
        lengths = {
            number: len(sample.document)
            for number, sample in zip(self._numbers, self._samples.buffer)
            if sample.document is not None
        }
        rooms = [self.context_length - sum(lengths[number] for number in items) for items in self._bins]
        return OpenBins(self.context_length, self.open_packs, self._bins, rooms, self._closed)

    def _closed_packs(self) -> Iterator[Pack]:
        while self._closed:
            samples = []
            for number in self._closed.pop(0):
                index = self._numbers.index(number)
                del self._numbers[index]
                samples.append(self._samples.pop(index))
            left_out, self._left_out = self._left_out, []
            documents = [sample.document for sample in samples if sample.document is not None]
            yield Pack(self.pack(documents), [sample.entry for sample in samples], left_out)

    def can_restore_sample(self) -> bool:
        """Packs are restored as part of the stream, not one by one."""
        return False

    def config(self) -> dict[str, Any]:
        """Return the settings that Energon compares."""
        return {
            "type": type(self).__qualname__,
            "dataset": self.dataset.config(),
            "context_length": self.context_length,
            "open_packs": self.open_packs,
        }
