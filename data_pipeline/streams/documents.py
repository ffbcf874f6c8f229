"""Packed documents as micro-batches: a blend of dual-code and text shards through Megatron-Energon."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.energon import (
    SavableDataset,
    TaskEncoder,
    WorkerConfig,
)
from megatron.energon.metadataset.loader_interface import DatasetBlendMode

from data_pipeline.shards.code_shards import (
    CODES_PART,
    FEATURES_PART,
    JSON_PART,
    CodeGeometry,
    DatasetManifest,
    FeatureGeometry,
    decode_sample,
)
from data_pipeline.shards.index import check_index
from data_pipeline.shards.reader import RawSample
from data_pipeline.streams.loader import StreamLoader, drawn_entries, is_training, load_blend, require_samples
from data_pipeline.streams.packing import split_document
from data_pipeline.streams.packing_dataset import EncodedSample, Pack, PackingDataset
from data_pipeline.streams.reader import worker_config
from data_pipeline.streams.states import added_up
from data_pipeline.streams.text_encoding import TextEncoder
from data_pipeline.streams.views import CODE_VIEWS, VIEWS, LeftOut, build_document
from dualtoken.unified_model.sequence import (
    Document,
    ImageLayout,
    PackedBatch,
    SpecialTokens,
    TextPart,
    TokenizedDocument,
    pack_documents,
    tokenize_document,
)

logger = logging.getLogger(__name__)


@dataclass
class BlendEntry:
    """One part of a blend: a folder of shards, what is made of its samples, and how often it is drawn."""

    path: str = ""
    """Folder prepared with `prepare_dataset`, or its address: dual-code shards; for the view `text`, shards
    of `KEY.txt`."""
    view: str = "document"
    """`caption` (image, then caption), `generate` (caption, then image), `document` (parts as they stand) or
    `text` (plain text)."""
    weight: float = 1.0
    """Share of the samples, relative to the other entries; 0 leaves the entry out."""
    languages: list[str] = field(default_factory=list)
    """Captions are taken in one of these languages; empty for any."""
    default_language: str = "en"
    """Language of a caption that does not say it."""


@dataclass
class DocumentStreamConfig:
    """What documents are made of, how they are shuffled and packed."""

    blend: list[BlendEntry] = field(default_factory=list)
    context_length: int = 4096
    """Tokens in a pack."""
    contexts_held: int = 8
    """Contexts' worth of documents that wait per worker to be packed; more fill packs better."""
    documents_per_pack: int = 0
    """So many documents in each pack, in the order they come, without padding; `context_length` is then the
    most that one document may have. So models whose documents differ in length alone learn from the same
    ones in each step. 0 packs as many as fill a context."""
    prompt_dropout: float = 0.1
    """Share of prompts of the view `generate` that are dropped in training, for classifier-free guidance."""
    num_workers: int = 0
    """Reading processes per rank; 0 reads in the trainer's process."""
    shuffle_buffer_size: int = 1000
    """Samples per worker among which the next is drawn; 0 or 1 for none beyond the shuffling of slices."""
    slice_length: int = 100
    """Samples read one after another before another slice of the shards may be drawn."""
    on_bad_sample: str = "stop"
    """`stop` ends the job, `skip` logs and goes on."""


@dataclass
class StreamStatistics:
    """What a rank has been given so far, counted when a pack is handed out."""

    packs: int = 0
    tokens: int = 0
    padding: int = 0
    documents: list[int] = field(default_factory=list)
    """Documents by blend entry."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Samples (or pieces of them) that made no document, by reason."""

    @property
    def padding_share(self) -> float:
        """Share of the tokens handed out that is padding."""
        return self.padding / self.tokens if self.tokens else 0.0

    def figures(self) -> dict[str, int]:
        """What belongs into a job's metrics: counts since its start, under the same names on every rank."""
        return {"left_out": sum(self.left_out.values())}


class _DocumentTaskEncoder(TaskEncoder):
    """Samples to tokenized documents to packs."""

    def __init__(
        self,
        config: DocumentStreamConfig,
        entries: list[BlendEntry],
        text_tokenizer: Any,
        special: SpecialTokens,
        geometry: CodeGeometry | None,
        seed: int,
        training: bool,
        layout: ImageLayout,
    ) -> None:
        super().__init__()
        self.config = config
        self.entries = entries
        self.text_tokenizer = TextEncoder(text_tokenizer)
        self.special = special
        self.geometry = geometry
        self.seed = seed
        self.training = training
        self.layout = layout

    def _draw(self, key: str, entry: int, count: int) -> random.Random:
        """Return the source of this sample's random choices.

        It depends on the sample and on how many the reader has seen, not on a running generator: restoring
        needs no more than the count, which is saved, and another split over ranks draws the same.
        """
        return random.Random(f"{self.seed}/{entry}/{key}/{count if self.training else 0}")

    def encode(self, sample: RawSample, count: int) -> EncodedSample:
        """Make the document of a sample, read as number `count`; several where a long one is split."""
        entry = self.entries[sample.entry]
        try:
            document = self._document(sample, entry, count)
        except LeftOut as reason:
            return EncodedSample(left_out=[str(reason)])
        tokenized = tokenize_document(document, self.text_tokenizer, self.special, layout=self.layout)
        context = self.config.context_length
        if len(tokenized) > context and entry.view in ("caption", "generate"):
            return EncodedSample(left_out=[f"longer than {context} tokens"])
        pieces, images = split_document(tokenized, context, self.special)
        return EncodedSample(pieces, [f"an image longer than {context} tokens"] * images)

    def _document(self, sample: RawSample, entry: BlendEntry, count: int) -> Document:
        if entry.view == "text":
            if "txt" not in sample.parts:
                raise ValueError(f"no txt among its parts {sorted(sample.parts)}, as the view text needs")
            text = sample.parts["txt"].decode("utf-8-sig")
            if not text.strip():
                raise LeftOut("an empty text")  # it would teach to write nothing
            return Document([TextPart(text)], sample.__key__)
        if missing := {CODES_PART, JSON_PART} - sample.parts.keys():
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        features = sample.parts.get(FEATURES_PART) if self.layout.features else None
        codes = decode_sample(sample.__key__, sample.parts[CODES_PART], sample.parts[JSON_PART], features)
        if self.geometry is not None:
            self.geometry.check(codes.codes)
        return build_document(
            codes,
            entry.view,
            self._draw(sample.__key__, sample.entry, count),
            entry.languages,
            entry.default_language,
            self.config.prompt_dropout if self.training else 0.0,
        )

    def stream(self, workers: WorkerConfig) -> SavableDataset:
        """Build the whole stream: shards of every entry, blended by weight, shuffled and packed."""
        config = self.config
        datasets = load_blend(self.entries, workers, self.training, config.slice_length, config.on_bad_sample)
        if self.training:
            return self.build_train_datasets(
                datasets=datasets,
                worker_config=workers,
                batch_size=None,
                shuffle_buffer_size=config.shuffle_buffer_size,
                blend_mode=DatasetBlendMode.DATASET_WEIGHT,
            )
        return self.build_val_datasets(datasets=datasets, worker_config=workers, batch_size=1)

    def _pack(self, documents: list[TokenizedDocument]) -> PackedBatch:
        whole = None if self.config.documents_per_pack else self.config.context_length
        return pack_documents(documents, whole)

    def build_batch(
        self, dataset: SavableDataset[RawSample], *, worker_config: WorkerConfig, **unused: Any
    ) -> SavableDataset[Pack]:
        """Encode and pack, in place of Energon's batching."""
        config = self.config
        return PackingDataset(
            dataset,
            self.encode,
            self._pack,
            config.context_length,
            config.contexts_held,
            config.documents_per_pack,
            worker_config=worker_config,
        )


class DocumentLoader(StreamLoader[PackedBatch]):
    """A stream of packs with `statistics` of what it handed out.

    They have `[1, context_length]` tokens, or with `documents_per_pack` as many as their documents.
    """

    def __init__(
        self, *arguments: Any, entries: list[BlendEntry], empty: PackedBatch, **options: Any
    ) -> None:
        """Wrap a data set of `Pack`; for the other arguments see `StreamLoader`."""
        super().__init__(*arguments, **options)
        self.entries = entries
        self.statistics = StreamStatistics(documents=[0] * len(entries))
        self._empty = empty

    def empty_batch(self) -> PackedBatch:
        """Return a pack of padding, for a rank whose validation pass ends before that of the others."""
        return self._empty

    def __next__(self) -> PackedBatch:
        while True:
            pack: Pack = super().__next__()  # type: ignore[assignment]
            self._count(pack)
            if pack.batch is not None:
                return pack.batch

    def _count(self, pack: Pack) -> None:
        statistics = self.statistics
        if pack.batch is not None:
            statistics.packs += 1
            statistics.tokens += pack.batch.input_ids.shape[1]
            statistics.padding += pack.batch.padding
        for entry in pack.entries:
            statistics.documents[entry] += 1
        for key, reason in pack.left_out:
            count = statistics.left_out[reason] = statistics.left_out.get(reason, 0) + 1
            if str(count).strip("0") == "1":  # the 1st, the 10th, the 100th ...
                logger.warning("left out %r: %s (%d so far on this rank)", key, reason, count)

    def save_state(self) -> dict[str, Any]:
        """Return the place in the stream and the statistics."""
        return {**super().save_state(), "statistics": asdict(self.statistics)}

    def restore_states(self, states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Go to a saved place; statistics are this rank's own, or those of all ranks on rank 0 of others."""
        states = super().restore_states(states)
        if self.rank == 0 or states[0]["world_size"] == self.world_size:
            self.statistics = StreamStatistics(**added_up([state["statistics"] for state in states]))
        else:
            self.statistics = StreamStatistics(documents=[0] * len(self.entries))
        return states


def document_loader(
    config: DocumentStreamConfig,
    text_tokenizer: Any,
    geometry: CodeGeometry | None = None,
    fingerprint: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    split: str = "train",
    layout: ImageLayout | None = None,
    features: FeatureGeometry | None = None,
) -> DocumentLoader:
    """Stream packed documents.

    Args:
        config: The blend and how to shuffle and pack.
        text_tokenizer: A transformers tokenizer with the special tokens, or a folder that holds one.
        geometry: Shape and range of the codes the model expects; needed unless all entries are text.
        fingerprint: Of the visual tokenizer the model expects; None to accept any.
        rank: This rank.
        world_size: Number of ranks; each reads its own part.
        seed: Changes order and random choices.
        split: `train` for an endless shuffled stream in which entries are drawn by weight, `val` for one
            ordered pass over every sample of every entry, without prompt dropout.
        layout: What stands in the sequence for an image; its codes by default.
        features: What the model takes for continuous features, where the layout has them.

    Raises:
        DatasetError: A folder cannot be streamed, or its codes or features are not those of the model.
        ValueError: The settings cannot be used.
    """
    training, layout = is_training(split), layout or ImageLayout()
    if bool(layout.features) != (features is not None):
        raise ValueError(f"layout is {layout} but features are {features}; give both or none")
    entries = _checked_entries(config, geometry)
    reads = any(entry.view in ("caption", "document") for entry in entries)
    if layout.tiles is not None and geometry is not None and reads:  # else many an image would be left out
        needed = layout.most_positions + layout.codes * (geometry.positions + 1) + 3
        if needed > config.context_length:
            raise ValueError(
                f"context_length is {config.context_length}, but an image in tiles takes up to {needed} "
                "tokens with its marks; set data.context_length to that and what its text takes, or take "
                "smaller grids"
            )
    samples = {}
    for entry in entries:
        samples[entry.path] = check_index(entry.path, check_shards=rank == 0)
        if entry.view in CODE_VIEWS and geometry is not None:
            DatasetManifest.load(entry.path).require(entry.path, geometry, fingerprint, features)
    workers = worker_config(rank, world_size, config.num_workers, seed, config.on_bad_sample)
    if training:
        require_samples(samples, workers)
    if isinstance(text_tokenizer, str | Path):
        from transformers import AutoTokenizer

        text_tokenizer = AutoTokenizer.from_pretrained(text_tokenizer)
    special = SpecialTokens.from_tokenizer(text_tokenizer)
    encoder = _DocumentTaskEncoder(config, entries, text_tokenizer, special, geometry, seed, training, layout)

    settings = asdict(config)
    del settings["blend"], settings["on_bad_sample"], settings["num_workers"]
    if not config.documents_per_pack:  # states that were saved before there was such a setting lack it
        del settings["documents_per_pack"]
    identity = {
        "stream": "documents",
        "blend": [
            [samples[entry.path], entry.view, entry.weight, list(entry.languages)] for entry in entries
        ],
        **settings,
        "seed": seed,
    }
    if features is not None:
        identity["layout"] = {"codes": layout.codes, "features": layout.features}
        if layout.tiles is not None:
            identity["layout"]["tiles"] = [list(grid) for grid in layout.tiles.grids]
    padding = tokenize_document(Document([]), text_tokenizer, special)
    return DocumentLoader(
        lambda reader, _: encoder.stream(reader),
        workers,
        identity,
        endless=training,
        samples=sum(samples[entry.path] for entry in entries),
        entries=entries,
        empty=pack_documents([padding], config.context_length),
    )


def _checked_entries(config: DocumentStreamConfig, geometry: CodeGeometry | None) -> list[BlendEntry]:
    """Return the entries with a weight above 0; ValueError if the settings cannot be used."""
    for entry in config.blend:
        if entry.view not in VIEWS:
            raise ValueError(f"{entry.path}: view is {entry.view!r}, expected one of {', '.join(VIEWS)}")
    entries = drawn_entries(config.blend)
    if geometry is None and any(entry.view in CODE_VIEWS for entry in entries):
        raise ValueError(
            "geometry is None, but the blend has entries with codes; pass the model's CodeGeometry"
        )
    if not 0 <= config.prompt_dropout <= 1:
        raise ValueError(f"prompt_dropout is {config.prompt_dropout}, expected 0 to 1")
    return entries
