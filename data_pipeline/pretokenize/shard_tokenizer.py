"""Image-text shards to codes, a batch at a time: read, decode, encode; every sample accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import DatasetError
from data_pipeline.pretokenize.overlap import overlapped
from data_pipeline.shards.code_shards import FEATURE_TYPES, CodeGeometry, CodeSample, FeatureGeometry
from data_pipeline.shards.image_text_shards import (
    BadSampleError,
    SourceSample,
    SourceSettings,
    check_unicode,
    read_sample,
    read_shard,
    source_address,
    without_tokens,
)
from data_pipeline.shards.tar_members import TarError
from dualtoken.unified_model.tiles import Tiles, in_order, parse_grids

if TYPE_CHECKING:  # torch is loaded where it is needed: a mistake on the command line is told before
    import torch

    from data_pipeline.images.decoding import DecodedImages


@dataclass(frozen=True)
class Settings(SourceSettings):
    """What the bytes of the output depend on, besides the visual tokenizer and the input."""

    batch_size: int = 64
    """Images encoded at a time; another batch size can change a code where two are equally near."""

    precision: str = "fp32"
    """Of the towers that encode, `fp32` or `bf16`; the nearest code is searched in fp32 either way."""

    features: str = "none"
    """What is kept of images for models that read continuous features: `none`; `float16` or `bfloat16`, the
    features of a vision tower; `pixels`, the images, for a tower in the model."""

    tiles: str = ""
    """Grids of tiles that images are cut into for that, besides being kept whole, such as `1x2,2x1,2x2`."""

    on_bad_shard: str = "stop"
    """A shard of which nothing can be read, or whose storage fails on the way, ends the job (`stop`), or what
    is missing of it goes to `rejected.jsonl` (`skip`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_bad_shard not in ("stop", "skip"):
            raise ValueError(f"on_bad_shard is {self.on_bad_shard!r}, expected 'stop' or 'skip'")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}, expected 'fp32' or 'bf16'")
        if self.features not in ("none", *FEATURE_TYPES):
            raise ValueError(f"features are {self.features!r}, expected none, {', '.join(FEATURE_TYPES)}")
        if self.tiles and self.features == "none":
            raise ValueError(
                f"tiles are {self.tiles!r} without features; expected one of --features "
                f"{', '.join(FEATURE_TYPES)} with --tiles, codes are of the whole picture"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected 1 or more")

    def tiles_of(self, image_size: int) -> Tiles | None:
        """Return how images are cut for a tower of so many pixels a side, None for not at all.

        Raises:
            ValueError: `tiles` is not a list of grids.
        """
        if not self.tiles:
            return None
        return Tiles(parse_grids(self.tiles.split(",")), image_size)


@dataclass(frozen=True)
class Rejection:
    """A sample that is left out, as a line of `rejected.jsonl`."""

    shard: str
    key: str | None
    """None where a shard breaks off and it is not known how many samples were to follow."""
    reason: str


@dataclass
class Batch:
    """Samples of one shard whose images are encoded together, in order."""

    shard: str
    """Name of the input shard."""
    samples: list[tuple[str | None, SourceSample | str]]
    """Key and sample, or the reason where there is no sample."""
    last: bool
    """Whether nothing of the shard follows."""

    @property
    def images(self) -> list[bytes]:
        """The images of all samples."""
        return [
            image for _, sample in self.samples if isinstance(sample, SourceSample) for image in sample.images
        ]


@dataclass
class DecodedBatch:
    """A batch of which it is known what becomes of each sample."""

    results: list[tuple[SourceSample, int] | Rejection]
    """Each sample with the place of its first image among those that could be decoded, or why it has none."""
    images: list[DecodedImages]
    """`batch_size` at a time."""
    sent: int
    """Images that were to be decoded."""
    last: bool

    @property
    def keys(self) -> list[str]:
        """The keys of the samples that go to the output."""
        return [result[0].key for result in self.results if not isinstance(result, Rejection)]


@dataclass
class EncodedBatch:
    """A batch of which the codes are made or, on a GPU, in the making."""

    results: list[tuple[SourceSample, int] | Rejection]
    codes: list[torch.Tensor]
    """On the CPU, [N, P, Q, D] each; on a GPU valid once `copied`."""
    features: list[torch.Tensor]
    """Likewise, [N, ...] each; none where none are kept."""
    counts: list[int]
    """How many of them each image has: 1, but of images in tiles as many as `FeatureGeometry.count`."""
    sizes: list[tuple[int, int]]
    """Height and width of each image in tiles; none of whole ones."""
    copied: torch.cuda.Event | None
    sent: int
    last: bool


class ShardTokenizer:
    """Turns the samples of a shard into samples with codes: `read`, `decode`, `encode`, `collect`.

    Batches hold samples of one shard only, so that its codes do not depend on who does which shard.
    """

    def __init__(
        self,
        visual_tokenizer: Any,
        decoder: Callable[[Sequence[bytes]], Any],
        settings: Settings,
        vision_tower: Any = None,
    ) -> None:
        """Encode with `visual_tokenizer` what `decoder` decodes; see `pretokenize`."""
        self.vision_tower = vision_tower
        config = visual_tokenizer.config
        tiles = settings.tiles_of(config.image_size)
        self.features = feature_geometry(settings.features, config.image_size, vision_tower, tiles)
        if (cut := getattr(decoder, "tiles", None)) != tiles:
            raise ValueError(f"the decoder cuts {cut}, the settings ask for {tiles}; expected the same")
        self.visual_tokenizer, self.decoder, self.settings = visual_tokenizer, decoder, settings
        self.geometry = CodeGeometry.of(config)
        self.images = 0
        """Images whose codes have been collected so far, bad ones too."""
        from data_pipeline.images.decoding import SideDecoder

        self._decode = SideDecoder(decoder)

    def __call__(self, source: str, prefix: str = "") -> Iterator[CodeSample | Rejection]:
        """Yield what becomes of each sample of a shard, in order; `prefix` is put before the keys.

        Raises:
            DatasetError: Nothing of the shard can be read, or its storage fails, and it is not to be skipped.
        """
        for results in overlapped(self.read(source, prefix), self.decode, self.encode, self.collect):
            yield from results

    def read(self, source: str, prefix: str = "") -> Iterator[Batch]:
        """Yield the batches of a shard, at least one; as `__call__`."""
        shard = Path(source_address(source)).name
        group: list[tuple[str | None, SourceSample | str]] = []
        images = 0
        for key, sample in self._read_samples(source, prefix):
            if images >= self.settings.batch_size:
                yield Batch(shard, group, last=False)
                group, images = [], 0
            group.append((key, sample))
            images += 0 if isinstance(sample, str) else len(sample.images)
        yield Batch(shard, group, last=True)

    def _read_samples(self, source: str, prefix: str) -> Iterator[tuple[str | None, SourceSample | str]]:
        """Yield key and sample, or the reason where there is no sample."""
        seen = set[str]()
        try:
            for key, parts in read_shard(source):
                yield key, self._read_sample(key, parts, prefix, seen)
        except (TarError, OSError) as error:
            damage = error if isinstance(error, TarError) else None
            if damage and damage.unfinished is not None:
                key, parts = damage.unfinished
                yield key, self._read_sample(key, parts, prefix, seen)
            said = without_tokens(" ".join(str(error).split()))
            reason = f"cannot be read{' further' if seen else ''}: {said}"
            # What is damaged stays so; a storage that fails may give the rest another time.
            if self.settings.on_bad_shard == "stop" and not (damage and seen):
                raise DatasetError(f"{source_address(source)}: {reason}") from error
            yield damage.key if damage else None, f"the shard {reason}"

    def _read_sample(
        self, key: str, parts: dict[str, bytes], prefix: str, seen: set[str]
    ) -> SourceSample | str:
        """Return the sample or the reason why it cannot be used."""
        try:
            if key in seen:
                raise BadSampleError("the key occurs more than once in the shard")
            seen.add(key)
            sample = read_sample(prefix + key, parts, self.settings)
            check_unicode(sample)
            return sample
        except BadSampleError as error:
            return str(error)

    def decode(self, batch: Batch) -> DecodedBatch:
        """Decode the images of a batch and say of each sample whether it can be used."""
        encoded, size = batch.images, self.settings.batch_size
        decoded = [self._decode(encoded[at : at + size]) for at in range(0, len(encoded), size)]
        places: list[int | str] = ["the decoder gave neither an image nor a reason"] * len(encoded)
        good = 0
        for number, images in enumerate(decoded):
            for index in images.kept:
                places[number * size + index] = good
                good += 1
            for bad in images.rejected:
                places[number * size + bad.index] = bad.reason
        results: list[tuple[SourceSample, int] | Rejection] = []
        taken = 0
        for key, sample in batch.samples:
            if isinstance(sample, str):
                results.append(Rejection(batch.shard, key, sample))
                continue
            own = places[taken : taken + len(sample.images)]
            taken += len(sample.images)
            reasons = ((number, reason) for number, reason in enumerate(own) if isinstance(reason, str))
            number, reason = next(reasons, (0, ""))
            if reason:
                reason = f"image {number}: {reason}" if len(own) > 1 else reason
                results.append(Rejection(batch.shard, key, reason))
            else:
                results.append((sample, int(own[0]) if own else 0))
        return DecodedBatch(results, [images for images in decoded if images.kept], len(encoded), batch.last)

    def encode(self, batch: DecodedBatch) -> EncodedBatch:
        """Encode the images of a batch; on a GPU that and the copy back are begun, not waited for."""
        import torch

        codes: list[torch.Tensor] = []
        features: list[torch.Tensor] = []
        counts: list[int] = []
        sizes: list[tuple[int, int]] = []
        copied = None
        for images in batch.images:
            pictures = images.for_current_stream()
            with self._autocast(pictures.device):
                made = self.visual_tokenizer.encode(pictures)  # [N, P, Q, D]
            if len(made) != len(images.kept):
                raise ValueError(f"the visual tokenizer gave {len(made)} codes for {len(images.kept)} images")
            codes.append(made.to("cpu", non_blocking=True))  # into pinned memory
            if (geometry := self.features) is not None:
                features.append(self._kept(pictures, images, geometry).to("cpu", non_blocking=True))
                in_tiles = geometry.tiles is not None
                counts += [geometry.count(size) for size in images.sizes] if in_tiles else [1] * len(made)
                sizes += images.sizes
            if made.is_cuda:
                copied = torch.cuda.current_stream(made.device).record_event()
        return EncodedBatch(batch.results, codes, features, counts, sizes, copied, batch.sent, batch.last)

    def _autocast(self, device: torch.device) -> torch.autocast:
        import torch

        return torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _kept(self, pictures: torch.Tensor, images: DecodedImages, geometry: FeatureGeometry) -> torch.Tensor:
        """What is kept of pictures [N, 3, S, S] besides codes, in the type that numpy holds it in."""
        import torch

        from dualtoken.unified_model.vision_tower import to_bytes

        tiles, crops = geometry.tiles, pictures
        if tiles is not None or geometry.kind == "pixels":
            crops = to_bytes(pictures)
        if tiles is not None:
            groups = zip(crops[:, None], images.tiles, strict=True)
            crops = torch.cat([part.to(pictures.device) for group in groups for part in group])
        if geometry.kind == "pixels":
            return crops
        with torch.no_grad(), self._autocast(pictures.device):
            made = [self.vision_tower(some) for some in crops.split(self.settings.batch_size)]
        features = torch.cat(made).to(getattr(torch, geometry.kind))
        if tiles is not None:
            each = zip(
                features.split([tiles.crops(size) for size in images.sizes]), images.sizes, strict=True
            )
            orders = ((own, tiles.order(size, geometry.shape[0])) for own, size in each)
            features = torch.cat([in_order(own, order) for own, order in orders])
        return features.view(torch.uint16) if geometry.kind == "bfloat16" else features

    def collect(self, batch: EncodedBatch) -> list[CodeSample | Rejection]:
        """Return what becomes of each sample of a batch; waits for the codes."""
        if batch.copied is not None:
            batch.copied.synchronize()
        codes = np.zeros((0, *self.geometry.shape), np.uint16)
        if batch.codes:
            made = np.concatenate([part.numpy() for part in batch.codes])
            self.geometry.check(made)
            codes = made.astype(np.uint16)
        features = None
        if self.features is not None:
            features = np.zeros((0, *self.features.entry_shape), FEATURE_TYPES[self.features.kind])
            if batch.features:
                features = np.concatenate([part.numpy() for part in batch.features])
        starts = [0, *accumulate(batch.counts)]
        self.images += batch.sent
        samples: list[CodeSample | Rejection] = []
        for result in batch.results:
            if isinstance(result, Rejection):
                samples.append(result)
                continue
            source, first = result
            stop = first + len(source.images)
            sample = CodeSample(source.key, codes[first:stop], source.parts, source.captions)
            if features is not None:
                sample.features = features[starts[first] : starts[stop]]
            if self.features is not None and self.features.tiles is not None:
                sample.sizes, sample.feature_counts = batch.sizes[first:stop], batch.counts[first:stop]
            samples.append(sample)
        return samples


def feature_geometry(
    kind: str, image_size: int, vision_tower: Any = None, tiles: Tiles | None = None
) -> FeatureGeometry | None:
    """Return what is kept of images for continuous features, None for `none`.

    Args:
        kind: as of `Settings.features`.
        image_size: pixels a side of the decoded images.
        vision_tower: a `VisionTower`, where features of one are kept.
        tiles: how images are cut; None for whole ones.

    Raises:
        ValueError: there is no tower where one is needed, one where none is, or it reads images of another
            size.
    """
    needs_tower = kind in ("float16", "bfloat16")
    if needs_tower != (vision_tower is not None):
        given = "without" if vision_tower is None else "with"
        raise ValueError(
            f"features are {kind!r} {given} a vision tower; expected --vision-tower with float16 and "
            "bfloat16, and none or pixels without it"
        )
    if kind == "pixels":
        return FeatureGeometry(kind, (3, image_size, image_size), tiles=tiles)
    if not needs_tower:
        return None
    from dualtoken.unified_model.vision_tower import features_per_image

    settings = vision_tower.settings
    if settings["image_size"] != image_size:
        raise ValueError(
            f"the vision tower reads images of {settings['image_size']} pixels a side, the visual tokenizer "
            f"of {image_size}; expected one size for both"
        )
    shape = (features_per_image(settings), settings["hidden_size"])
    return FeatureGeometry(kind, shape, vision_tower.fingerprint(), tiles)
