"""Packing as an Energon data set whose waiting documents are part of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.energon import Sample, SavableDataset, WorkerConfig, edataclass
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from data_pipeline.errors import DatasetError
from data_pipeline.streams.packing import InOrder, Waiting, take_out
from dualtoken.unified_model.sequence import PackedBatch, TokenizedDocument

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
    """Packs documents as they come: of those that wait, the oldest and what fills a context best with it.

    With `documents_per_pack`, so many in the order they come, however long they are together.

    Energon's own packing empties its whole buffer at a time, the last packs of which are then badly filled;
    here the buffer is filled up before each pack. What waits is saved as restore keys and read again, so that
    a restored stream goes on with the same packs.
    """

    _savable_fields = ("_samples", "_left_out")

    def __init__(
        self,
        dataset: SavableDataset[DocumentSample],
        pack: Callable[[list[TokenizedDocument]], PackedBatch],
        context_length: int,
        contexts_held: int,
        documents_per_pack: int = 0,
        *,
        worker_config: WorkerConfig,
    ) -> None:
        """Wrap a stream of documents, none longer than `context_length`; `pack` makes the batch."""
        super().__init__(dataset, worker_config=worker_config)
        if context_length < 1 or contexts_held < 1:
            raise ValueError(
                f"context_length is {context_length} and contexts_held {contexts_held}, expected at least 1"
            )
        if documents_per_pack < 0:
            raise ValueError(f"documents_per_pack is {documents_per_pack}, expected 1 or more, or 0")
        self.pack = pack
        self.context_length = context_length
        self.contexts_held = contexts_held
        self.documents_per_pack = documents_per_pack
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Forget all documents that wait."""
        self._samples: SavableSampleBuffer[DocumentSample] = SavableSampleBuffer(
            self.dataset, worker_config=self.worker_config
        )
        self._left_out: list[tuple[str, str]] = []

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Return the number of documents, as the number of packs is not known before they are made."""
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[Pack]:
        self._samples.worker_start()
        lengths = (len(sample.document) for sample in self._samples.buffer if sample.document is not None)
        waiting = self._waiting(lengths)
        for sample in self.dataset:
            if sample.document is None:
                self._left_out.append((sample.__key__, sample.reason))
                if len(self._left_out) == _MOST_LEFT_OUT_IN_A_ROW:
                    raise DatasetError(
                        f"{len(self._left_out)} samples in a row made no document; the last: {sample.reason}"
                    )
                continue
            self._samples.append(sample)
            if waiting.add(len(sample.document)):
                yield self._next_pack(waiting)
        while waiting.lengths:
            yield self._next_pack(waiting)
        if self._left_out:
            left_out, self._left_out = self._left_out, []
            yield Pack(None, [], left_out)

    def _waiting(self, lengths: Iterable[int]) -> Waiting | InOrder:
        if self.documents_per_pack:
            return InOrder(self.documents_per_pack, lengths)
        return Waiting(self.context_length, self.contexts_held, lengths)

    def _next_pack(self, waiting: Waiting | InOrder) -> Pack:
        """Take a pack's documents out of those that wait."""
        samples = take_out(self._samples, waiting.take())
        left_out, self._left_out = self._left_out, []
        documents = [sample.document for sample in samples if sample.document is not None]
        return Pack(self.pack(documents), [sample.entry for sample in samples], left_out)

    def can_restore_sample(self) -> bool:
        """Packs are restored as part of the stream, not one by one."""
        return False

    def config(self) -> dict[str, Any]:
        """Return the settings that Energon compares."""
        return {
            "type": type(self).__qualname__,
            "dataset": self.dataset.config(),
            "context_length": self.context_length,
            "contexts_held": self.contexts_held,
            **({"documents_per_pack": self.documents_per_pack} if self.documents_per_pack else {}),
        }
