"""Samples to packs of documents, as an Energon data set whose waiting documents are part of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.errors import ErrorContext
from megatron.energon.wrappers.base import BaseWrapperDataset

from data_pipeline.errors import DatasetError
from data_pipeline.shards.reader import RawSample
from data_pipeline.streams.packing import InOrder, Waiting, take_out
from dualtoken.unified_model.sequence import PackedBatch, TokenizedDocument

_MOST_LEFT_OUT_IN_A_ROW = 100_000
_MOST_BAD_IN_A_ROW = 100
_AHEAD = 64  # samples read, then encoded, one after another: a fifth faster by the caches of a CPU


@dataclass
class EncodedSample:
    """The documents made of a sample, and the reasons why some, or parts of them, were left out."""

    documents: list[TokenizedDocument] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class Pack:
    """A pack, the blend entry of each of its documents, and what was left out since the pack before.

    `batch` is None at the end of a pass, where samples were left out after its last pack.
    """

    batch: PackedBatch | None
    entries: list[int]
    left_out: list[tuple[str, str]]
    """(key, reason)."""

    def pin_memory(self) -> Pack:
        """Return it in page-locked memory, as torch's loader asks for where there is a GPU."""
        return replace(self, batch=None if self.batch is None else self.batch.pin_memory())


class PackingDataset(BaseWrapperDataset[RawSample, Pack]):
    """Packs documents as they come: of those that wait, the oldest and what fills a context best with it.

    With `documents_per_pack`, so many in the order they come, however long they are together.

    Energon's own packing empties its whole buffer at a time, the last packs of which are then badly filled;
    here the buffer is filled up before each pack. What waits is saved by what it was made of and read again,
    so that a restored stream goes on with the same packs. Samples are encoded here too: the contexts and
    generators that Energon puts around each call take half as long as making the document does.
    """

    _savable_fields = ("_count", "_ahead", "_waiting", "_left_out")

    def __init__(
        self,
        dataset: SavableDataset[RawSample],
        encode: Callable[[RawSample, int], EncodedSample],
        pack: Callable[[list[TokenizedDocument]], PackedBatch],
        context_length: int,
        contexts_held: int,
        documents_per_pack: int = 0,
        *,
        worker_config: WorkerConfig,
    ) -> None:
        """Wrap a stream of samples.

        Args:
            dataset: The samples.
            encode: Makes the documents of a sample, none longer than `context_length`; depends on nothing but
                the sample and how many were read before it.
            pack: Makes the batch.
            context_length: Tokens in a pack.
            contexts_held: Contexts' worth of documents that wait.
            documents_per_pack: Documents in a pack; 0 for as many as fit.
            worker_config: That of `dataset`.
        """
        super().__init__(dataset, worker_config=worker_config)
        if context_length < 1 or contexts_held < 1:
            raise ValueError(
                f"context_length is {context_length} and contexts_held {contexts_held}, expected at least 1"
            )
        if documents_per_pack < 0:
            raise ValueError(f"documents_per_pack is {documents_per_pack}, expected 1 or more, or 0")
        self.encode = encode
        self.pack = pack
        self.context_length = context_length
        self.contexts_held = contexts_held
        self.documents_per_pack = documents_per_pack
        self._errors = ErrorContext("encoding", worker_config.global_error_handler, _MOST_BAD_IN_A_ROW)
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Forget all documents that wait."""
        self._count = 0  # of samples read
        # How many samples were read before one, and the key by which it can be read again: of those that
        # were read ahead, and of those of the documents that wait, with their place in what was made of it.
        self._ahead: list[tuple[int, Any]] = []
        self._waiting: list[tuple[int, Any, int]] = []
        self._left_out: list[tuple[str, str]] = []

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Return the number of samples, as the number of packs is not known before they are made."""
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[Pack]:
        held = self._read_again()
        lengths = self._lengths(len(document) for _, document in held)
        for sample, (count, key), encoded in self._encoded():
            for reason in encoded.left_out:
                self._leave_out(sample.__key__, reason)
            for number, document in enumerate(encoded.documents):
                held.append((sample.entry, document))
                self._waiting.append((count, key, number))
                lengths.add(len(document))
            while lengths.are_enough:
                yield self._next_pack(held, lengths)
        while held:
            yield self._next_pack(held, lengths)
        if self._left_out:
            left_out, self._left_out = self._left_out, []
            yield Pack(None, [], left_out)

    def _encoded(self) -> Iterator[tuple[RawSample, tuple[int, Any], EncodedSample]]:
        """Yield each sample, how to read it again, and its documents, once it is not among those ahead."""
        samples = [self.dataset.restore_sample(key) for _, key in self._ahead]
        source = iter(self.dataset)
        while True:
            for sample in islice(source, max(0, _AHEAD - len(samples))):
                samples.append(sample)
                self._ahead.append((self._count, sample.__restore_key__))
                self._count += 1
            if not samples:
                return
            made = [self._encode(sample, count) for sample, (count, _) in zip(samples, self._ahead)]
            for sample, encoded in zip(samples, made):
                place = self._ahead.pop(0)
                if encoded is not None:
                    yield sample, place, encoded
            samples = []

    def _encode(self, sample: RawSample, count: int) -> EncodedSample | None:
        """Encode a sample; None for a bad one, where these are to be skipped."""
        try:
            encoded = self.encode(sample, count)
        except Exception:
            with self._errors.handle_errors(sample):
                raise
            return None
        self._errors.reset()
        return encoded

    def _read_again(self) -> list[tuple[int, TokenizedDocument]]:
        """Return the documents that wait; the pieces of a long one stand together and are made together.

        Those that are no longer made of their samples, as other versions made them, wait no more.
        """
        held: list[tuple[int, TokenizedDocument]] = []
        waiting: list[tuple[int, Any, int]] = []
        for (count, key), places in groupby(self._waiting, key=itemgetter(0, 1)):
            sample = self.dataset.restore_sample(key)
            documents = self.encode(sample, count).documents
            kept = [place for place in places if place[2] < len(documents)]
            waiting += kept
            held += [(sample.entry, documents[number]) for _, _, number in kept]
        self._waiting = waiting
        return held

    def _leave_out(self, key: str, reason: str) -> None:
        self._left_out.append((key, reason))
        if len(self._left_out) == _MOST_LEFT_OUT_IN_A_ROW:
            raise DatasetError(f"{len(self._left_out)} samples in a row made no document; the last: {reason}")

    def _lengths(self, lengths: Iterable[int]) -> Waiting | InOrder:
        if self.documents_per_pack:
            return InOrder(self.documents_per_pack, lengths)
        return Waiting(self.context_length, self.contexts_held, lengths)

    def _next_pack(self, held: list[tuple[int, TokenizedDocument]], lengths: Waiting | InOrder) -> Pack:
        """Take a pack's documents out of those that wait."""
        places = lengths.take()
        take_out(self._waiting, places)
        chosen = take_out(held, places)
        left_out, self._left_out = self._left_out, []
        batch = self.pack([document for _, document in chosen])
        return Pack(batch, [entry for entry, _ in chosen], left_out)

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
