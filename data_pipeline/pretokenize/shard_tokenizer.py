"""One image-text shard to codes: read, decode, encode, every sample accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DatasetError
from data_pipeline.shards.code_shards import CodeGeometry, CodeSample
from data_pipeline.shards.image_text_shards import (
    BadSampleError,
    SourceSample,
    SourceSettings,
    check_unicode,
    read_sample,
    read_shard,
    source_address,
)
from data_pipeline.shards.tar_members import TarError


@dataclass(frozen=True)
class Settings(SourceSettings):
    """What the bytes of the output depend on, besides the visual tokenizer and the input."""

    batch_size: int = 64
    """Images encoded at a time; another batch size can change a code where two are equally near."""

    on_bad_shard: str = "stop"
    """A shard of which nothing can be read, or whose storage fails on the way, ends the job (`stop`), or what
    is missing of it goes to `rejected.jsonl` (`skip`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_bad_shard not in ("stop", "skip"):
            raise ValueError(f"on_bad_shard is {self.on_bad_shard!r}, expected 'stop' or 'skip'")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected 1 or more")


@dataclass(frozen=True)
class Rejection:
    """A sample that is left out, as a line of `rejected.jsonl`."""

    shard: str
    key: str | None
    """None where a shard breaks off and it is not known how many samples were to follow."""
    reason: str


class ShardTokenizer:
    """Turns the samples of a shard into samples with codes."""

    def __init__(
        self, visual_tokenizer: Any, decoder: Callable[[Sequence[bytes]], Any], settings: Settings
    ) -> None:
        """Encode with `visual_tokenizer` what `decoder` decodes; see `pretokenize`."""
        config = visual_tokenizer.config
        self.visual_tokenizer, self.decoder, self.settings = visual_tokenizer, decoder, settings
        self.geometry = CodeGeometry(config.positions, config.num_quantizers, config.codebook_size)
        self.images = 0
        """Images sent through the decoder so far, bad ones too."""

    def __call__(self, source: str, prefix: str = "") -> Iterator[CodeSample | Rejection]:
        """Yield what becomes of each sample of a shard, in order; `prefix` is put before the keys.

        Batches hold samples of this shard only, so that its codes do not depend on who does which shard.

        Raises:
            DatasetError: Nothing of the shard can be read, or its storage fails, and it is not to be skipped.
        """
        shard = Path(source_address(source)).name
        group: list[tuple[str | None, SourceSample | str]] = []
        images = 0
        for key, sample in self._read(source, prefix):
            group.append((key, sample))
            images += 0 if isinstance(sample, str) else len(sample.images)
            if images >= self.settings.batch_size:
                yield from self._encode(group, shard)
                group, images = [], 0
        yield from self._encode(group, shard)

    def _read(self, source: str, prefix: str) -> Iterator[tuple[str | None, SourceSample | str]]:
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
            reason = f"cannot be read{' further' if seen else ''}: {' '.join(str(error).split())}"
            # What is damaged stays so; a storage that fails may give the rest another time.
            if self.settings.on_bad_shard == "stop" and not (damage and seen):
                raise DatasetError(f"{source}: {reason}") from error
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

    def _encode(
        self, group: list[tuple[str | None, SourceSample | str]], shard: str
    ) -> Iterator[CodeSample | Rejection]:
        """Encode the images of some samples together."""
        encoded = [
            image for _, sample in group if isinstance(sample, SourceSample) for image in sample.images
        ]
        size = self.settings.batch_size
        codes = [
            own for at in range(0, len(encoded), size) for own in self._encode_images(encoded[at : at + size])
        ]
        taken = 0
        for key, sample in group:
            if isinstance(sample, str):
                yield Rejection(shard, key, sample)
                continue
            own = codes[taken : taken + len(sample.images)]
            taken += len(sample.images)
            good = [image for image in own if not isinstance(image, str)]
            if len(good) == len(own):
                stacked = np.stack(good) if good else np.zeros((0, *self.geometry.shape), np.uint16)
                yield CodeSample(sample.key, stacked, sample.parts, sample.captions)
                continue
            number, reason = next((n, image) for n, image in enumerate(own) if isinstance(image, str))
            yield Rejection(shard, key, f"image {number}: {reason}" if len(own) > 1 else reason)

    def _encode_images(self, encoded: list[bytes]) -> list[np.ndarray | str]:
        """Return for each image its codes uint16 [P, Q, D] or the reason why it has none."""
        self.images += len(encoded)
        decoded = self.decoder(encoded)
        results: list[np.ndarray | str] = ["the decoder gave neither an image nor a reason"] * len(encoded)
        for bad in decoded.rejected:
            results[bad.index] = bad.reason
        if decoded.kept:
            codes = self.visual_tokenizer.encode(decoded.images).cpu().numpy()  # [N, P, Q, D]
            self.geometry.check(codes)
            for index, own in zip(decoded.kept, codes.astype(np.uint16), strict=True):
                results[index] = own
        return results
