"""Pictures with captions as micro-batches, not decoded: image-text shards through Megatron-Energon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron.energon import (
    DefaultTaskEncoder,
    Sample,
    SavableDataset,
    WorkerConfig,
    edataclass,
    stateless,
)
from megatron.energon.metadataset.loader_interface import DatasetBlendMode

from data_pipeline.errors import DatasetError
from data_pipeline.shards.image_text_shards import image_parts, read_captions
from data_pipeline.shards.index import check_index
from data_pipeline.shards.reader import RawSample
from data_pipeline.streams.loader import StreamLoader, drawn_entries, is_training, load_blend, require_samples
from data_pipeline.streams.reader import worker_config

_MOST_WITHOUT_A_PICTURE = 10_000


@dataclass
class ImageFolder:
    """One folder of a blend, and how often its pictures are drawn."""

    path: str = ""
    """Folder of image-text shards, prepared with `prepare_dataset`, or its address."""
    weight: float = 1.0
    """Share of the pictures, relative to the other folders; 0 leaves the folder out."""


@dataclass
class ImageStreamConfig:
    """Where pictures with captions come from and how they are shuffled."""

    path: str = ""
    """Folder of image-text shards, prepared with `prepare_dataset`, or its address; in place of `blend`."""
    blend: list[ImageFolder] = field(default_factory=list)
    """Several folders, each drawn by its weight; a validation pass reads all of each."""
    num_workers: int = 0
    """Reading processes per rank; 0 reads in the trainer's process."""
    shuffle_buffer_size: int = 1000
    """Samples per worker among which the next is drawn; 0 or 1 for none beyond the shuffling of slices."""
    slice_length: int = 100
    """Samples read one after another before another slice of the shards may be drawn."""
    default_language: str = "en"
    """Language of a caption that does not say it (`KEY.txt`)."""
    require_captions: bool = False
    """Treat a sample without any caption as bad."""
    on_bad_sample: str = "skip"
    """`skip` logs and goes on, `stop` ends the job."""

    def folders(self) -> list[ImageFolder]:
        """Return the folders to read, those with a weight above 0.

        Raises:
            ValueError: No folder is given, or a weight cannot be used.
        """
        folders = [ImageFolder(self.path)] if self.path else self.blend
        if not folders:
            raise ValueError(
                "no pictures are given; expected path=FOLDER, or blend, a list of path and weight"
            )
        for folder in folders:
            if not folder.path:
                raise ValueError("an entry of the blend has no path, expected a folder of image-text shards")
        return drawn_entries(folders)


@dataclass
class ImageTextBatch:
    """A micro-batch of pictures as they are in the shard, not decoded; lists of one length."""

    keys: list[str]
    image_bytes: list[bytes]
    captions: list[dict[str, str]]
    """Language -> caption; empty where there is none."""
    shards: list[str] = field(default_factory=list)
    """Where each was read, for messages; empty in a batch that was not read."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of_parts(cls, parts: list[tuple[ImageTextBatch, slice]]) -> ImageTextBatch:
        """Put together parts of micro-batches, in their order."""
        return cls(
            keys=[key for batch, part in parts for key in batch.keys[part]],
            image_bytes=[data for batch, part in parts for data in batch.image_bytes[part]],
            captions=[captions for batch, part in parts for captions in batch.captions[part]],
            shards=[shard for batch, part in parts for shard in batch.shards[part]],
        )


@edataclass
class _ImageTextSample(Sample):
    """One picture with its captions."""

    image: bytes
    captions: dict[str, str]
    shard: str


class _ImageTaskEncoder(DefaultTaskEncoder):
    """Image-text samples to micro-batches, one entry per picture."""

    def __init__(self, config: ImageStreamConfig) -> None:
        super().__init__()
        self.config = config
        self._without_a_picture = 0  # in a row

    @stateless
    def encode_sample(self, sample: RawSample) -> Iterator[_ImageTextSample]:
        """Yield the pictures of a sample; several where the shard has `KEY.0.jpg`, `KEY.1.jpg`."""
        captions = read_captions(sample.parts, self.config.default_language)
        if self.config.require_captions and not captions:
            raise ValueError("no caption; expected txt, or json with caption or captions")
        names = image_parts(sample.parts)
        self._without_a_picture = 0 if names else self._without_a_picture + 1
        if self._without_a_picture == _MOST_WITHOUT_A_PICTURE:
            raise DatasetError(
                f"{_MOST_WITHOUT_A_PICTURE} samples in a row without a picture, the last of "
                f"{sorted(sample.parts)}; expected KEY.jpg, KEY.png or KEY.webp"
            )
        for index, name in enumerate(names):
            yield _ImageTextSample(
                __key__=sample.__key__ if len(names) == 1 else f"{sample.__key__}.{index}",
                __restore_key__=sample.__restore_key__,
                image=sample.parts[name],
                captions=captions,
                shard=sample.shard,
            )

    @stateless
    def batch(self, samples: list[_ImageTextSample]) -> ImageTextBatch:
        return ImageTextBatch(
            keys=[sample.__key__ for sample in samples],
            image_bytes=[sample.image for sample in samples],
            captions=[sample.captions for sample in samples],
            shards=[sample.shard for sample in samples],
        )


def image_loader(
    config: ImageStreamConfig,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    split: str = "train",
) -> StreamLoader[ImageTextBatch]:
    """Stream pictures with captions.

    Args:
        config: The folders and how to shuffle.
        micro_batch_size: Pictures per batch; the last batch of a validation pass may be smaller.
        rank: This rank.
        world_size: Number of ranks; each reads its own part.
        seed: Changes the order.
        split: `train` for an endless shuffled stream, `val` for one ordered pass.

    Raises:
        DatasetError: A folder cannot be streamed.
        ValueError: The settings cannot be used.
    """
    training = is_training(split)
    folders = config.folders()
    samples = {folder.path: check_index(folder.path, check_shards=rank == 0) for folder in folders}
    workers = worker_config(rank, world_size, config.num_workers, seed, config.on_bad_sample)
    if training:
        require_samples(samples, workers)

    def build(workers: WorkerConfig, batch_size: int) -> SavableDataset:
        encoder = _ImageTaskEncoder(config)
        datasets = load_blend(folders, workers, training, config.slice_length, config.on_bad_sample)
        if training:
            return encoder.build_train_datasets(
                datasets=datasets,
                worker_config=workers,
                batch_size=batch_size,
                shuffle_buffer_size=config.shuffle_buffer_size,
                blend_mode=DatasetBlendMode.DATASET_WEIGHT,
            )
        return encoder.build_val_datasets(datasets=datasets, worker_config=workers, batch_size=batch_size)

    identity = {
        "stream": "images",
        "blend": [[samples[folder.path], folder.weight] for folder in folders],
        "shuffle_buffer_size": config.shuffle_buffer_size,
        "slice_length": config.slice_length,
        "seed": seed,
    }
    return StreamLoader(
        build,
        workers,
        identity,
        micro_batch_size=micro_batch_size,
        join=ImageTextBatch.of_parts,
        endless=training,
        samples=sum(samples[folder.path] for folder in folders),
    )
