"""Samples of prepared shards by their index, one read each, as the source of Energon's streams.

Energon's own reader goes through `tarfile` and a storage layer, most of the cost of a small sample; here a
sample of a local shard is one `pread` and a look at its headers, and of a remote one a part of a block.
"""

from __future__ import annotations

import io
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.energon import Sample, SavableDataset, WorkerConfig, edataclass
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.base_webdataset import BaseWebdatasetFactory
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.flavors.webdataset.structs import ShardInfo
from megatron.energon.rng import WorkerRng

from data_pipeline.errors import DatasetError
from data_pipeline.shards.index import local_index
from data_pipeline.shards.remote_files import RemoteBlocks, is_remote, with_retries
from data_pipeline.shards.tar_members import TarError, iterate_samples

logger = logging.getLogger(__name__)

_PARALLEL_SLICES = 16
_OFFSETS_AT_A_TIME = 4096


@edataclass
class RawSample(Sample):
    """The members of a sample by the end of their names (`json`, `codes.npy`), as they are in the shard."""

    parts: dict[str, bytes]
    shard: str
    entry: int = 0
    """Index of the blend entry it was read for."""


class _Offsets:
    """Where the samples of a shard begin, by its index, of which a stretch is read at a time.

    The index of a shard of 100 GB can be tens of megabytes; a slice of its samples needs little of it.
    """

    def __init__(self, read: Callable[[int, int], bytes], samples: int) -> None:
        """Read with `read`, from a byte on so many bytes."""
        self._read, self._samples = read, samples
        self._first = 0
        self._offsets: list[int] = []

    def bounds(self, number: int) -> tuple[int, int]:
        """Return where a sample begins and where the next one does, or the shard's end is."""
        at = number - self._first
        if not 0 <= at < len(self._offsets) - 1:
            at = number % _OFFSETS_AT_A_TIME
            self._first = number - at
            size = 8 * (min(_OFFSETS_AT_A_TIME, self._samples - self._first) + 1)
            data = self._read(8 * self._first, size)
            if len(data) < size:
                raise TarError("its index is shorter than its samples ask for; prepare the data set again")
            self._offsets = np.frombuffer(data, "<u8").tolist()
        return self._offsets[at], self._offsets[at + 1]


class LocalShardReader:
    """The samples of local shards by their number over all shards."""

    def __init__(
        self, shards: Sequence[ShardInfo], skip_unreadable: bool = False, excluded: Collection[str] = ()
    ) -> None:
        """Read `shards` but for `excluded` samples, named `SHARD/KEY`, which are None.

        A sample that stays unreadable is left out too, or raises DatasetError.
        """
        self._paths = self._find(shards)
        self._names = [shard.name for shard in shards]
        self._excluded = excluded
        self._starts = [0, *np.cumsum([shard.count for shard in shards]).tolist()]
        self._skip_unreadable = skip_unreadable
        self._open: dict[int, tuple[Any, _Offsets]] = {}

    def _find(self, shards: Sequence[ShardInfo]) -> list[str]:
        return [str(shard.path.local_path()) for shard in shards]

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """Read a sample; errors of the file system or the network that may pass are tried again."""
        shard = bisect_right(self._starts, index) - 1
        try:
            return with_retries(lambda: self._read(shard, index))
        except (OSError, ValueError, ImportError) as error:
            number = index - self._starts[shard]
            message = f"{self._paths[shard]}: sample {number} cannot be read: {' '.join(str(error).split())}"
            if not self._skip_unreadable:
                raise DatasetError(message) from error
        logger.warning("skipped: %s", message)
        return None

    def _read(self, shard: int, index: int) -> dict[str, Any] | None:
        number = index - self._starts[shard]
        try:
            file, offsets = self._open_shard(shard)
            start, end = offsets.bounds(number)
            data = self._read_range(file, start, end - start)
        except Exception:
            self._open.pop(shard, None)
            raise
        if len(data) < end - start:
            raise TarError("truncated: the shard is shorter than its index says")
        samples = list(iterate_samples(io.BytesIO(data), fragment=True))
        if len(samples) != 1:
            raise TarError(f"{len(samples)} samples where the index has one; prepare the data set again")
        key, parts = samples[0]
        if self._excluded and f"{self._names[shard]}/{key}" in self._excluded:
            return None
        return {"key": key, "parts": parts, "shard": self._paths[shard], "restore_key": ("Webdataset", index)}

    def _read_range(self, file: Any, start: int, size: int) -> bytes:
        return os.pread(file.fileno(), size, start)

    def _open_shard(self, shard: int) -> tuple[Any, _Offsets]:
        opened = self._open.pop(shard, None)
        if opened is None:
            opened = self._open_files(self._paths[shard], self._starts[shard + 1] - self._starts[shard])
            if len(self._open) > _PARALLEL_SLICES:
                self._open.pop(next(iter(self._open)))
        self._open[shard] = opened  # last in the order of use
        return opened

    def _open_files(self, path: str, samples: int) -> tuple[Any, _Offsets]:
        def read_index(start: int, size: int) -> bytes:
            with open(f"{path}.idx", "rb", buffering=0) as index:
                return os.pread(index.fileno(), size, start)

        return open(path, "rb", buffering=0), _Offsets(read_index, samples)


class RemoteShardReader(LocalShardReader):
    """The samples of shards below an address, read in blocks of which the last few are kept."""

    def __init__(self, address: str, shards: Sequence[ShardInfo], *options: Any) -> None:
        """Read `shards`, named as they are below `address`; `options` as of `LocalShardReader`."""
        self._address = address.rstrip("/")
        super().__init__(shards, *options)

    def _find(self, shards: Sequence[ShardInfo]) -> list[str]:
        return [f"{self._address}/{shard.name}" for shard in shards]

    def _read_range(self, file: Any, start: int, size: int) -> bytes:
        return file.read(start, size)

    def _open_files(self, path: str, samples: int) -> tuple[Any, _Offsets]:
        index = RemoteBlocks(f"{path}.idx", 8 * (samples + 1))
        end = int.from_bytes(index.read(8 * samples, 8), "little")
        return RemoteBlocks(path, end), _Offsets(index.read, samples)


class _SliceRng(WorkerRng):
    """Chooses among slices as its parent does, number for number; adds weights up only when they change."""

    _weights: torch.Tensor | None = None
    _version = -1

    def choice_idx(self, probs: torch.Tensor) -> int:
        if self._weights is not probs or self._version != probs._version:
            self._weights, self._version = probs, probs._version
            sums = torch.cumsum(probs, dim=0)
            self._sums, self._total = sums.tolist(), sums[-1]
        if len(self._sums) == 1:
            return 0
        return bisect_right(self._sums, (torch.rand(1, generator=self.rng) * self._total).item())


class _ShardDataset(WebdatasetSampleLoaderDataset):
    """Energon's shuffling over slices of shards, yielding `RawSample`."""

    def __init__(self, entry: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._entry = entry

    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._worker_rng = _SliceRng(self.worker_config)

    def _raw(self, read: dict[str, Any]) -> RawSample:
        return RawSample(
            __key__=read["key"],
            __restore_key__=read["restore_key"],
            parts=read["parts"],
            shard=read["shard"],
            entry=self._entry,
        )

    def __iter__(self) -> Iterator[RawSample]:  # type: ignore[override]
        for sample in super().__iter__():
            yield self._raw(sample.data[0])  # type: ignore[arg-type]

    def restore_sample(self, restore_key: tuple[Any, ...]) -> RawSample:  # type: ignore[override]
        """Read the sample of a restore key again."""
        read = super().restore_sample(restore_key).data[0]
        if read is None:
            raise DatasetError(f"sample {restore_key} of the saved state cannot be read any more")
        return self._raw(read)  # type: ignore[arg-type]


class PreparedShards(BaseWebdatasetFactory[RawSample]):
    """A prepared folder of shards as an Energon data set of raw samples."""

    __sample_type__ = RawSample

    def __init__(
        self,
        path: str,
        worker_config: WorkerConfig,
        training: bool,
        slice_length: int,
        entry: int = 0,
        skip_unreadable: bool = False,
    ) -> None:
        """Open the folder; in training slices of about `slice_length` samples are read in random order."""
        with local_index(path) as folder:
            super().__init__(
                EPath(folder),
                split_part="train",
                training=training,
                worker_config=worker_config,
                max_samples_per_sequence=slice_length if training else None,
            )
        self.address = str(path)
        self.entry = entry
        self.skip_unreadable = skip_unreadable

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset[RawSample]:
        """Divide the samples over ranks and workers as Energon does and read them with the reader above.

        Of fewer samples than there are workers each gets all, in an order of its own: divided, only those
        that have one would draw it, and its share of a blend would be smaller than its weight.
        """
        own = max(1, self.worker_config.num_workers)
        if self.training and len(self) < self.worker_config.world_size * own:
            alone = replace(self.worker_config, rank=0, world_size=1, num_workers=1)
            slices = [*self.shard_workers(self.shards, alone, max_samples_per_sequence=1)] * own
        else:
            slices = self.shard_workers(
                self.shards,
                worker_config=self.worker_config,
                max_samples_per_sequence=self.max_samples_per_sequence,
                rotation_offset=worker_rotation_offset,
            )
        options = self.shards, self.skip_unreadable, self.sample_excludes
        if is_remote(self.address):
            reader: Any = RemoteShardReader(self.address, *options)
        else:
            reader = LocalShardReader(*options)
        return _ShardDataset(
            self.entry,
            [reader],
            slices,
            worker_config=self.worker_config,
            shuffle_over_epochs=self.shuffle_over_epochs if self.training else None,
            parallel_slice_iters=_PARALLEL_SLICES if self.training else 1,
        )

    def load_sample(self, raw_data: Any) -> RawSample:
        """Not on the way here: `build` makes raw samples itself."""
        raise TypeError("PreparedShards reads samples in build()")
