"""Samples of prepared shards by their index, one read each, as the source of Energon's streams.

Energon's own reader goes through `tarfile` and a storage layer, most of the cost of a small sample; here a
sample of a local shard is one `pread` and a look at its headers. Remote shards take Energon's.
"""

from __future__ import annotations

import io
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from megatron.energon import Sample, SavableDataset, WorkerConfig, edataclass
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.base_webdataset import BaseWebdatasetFactory
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.flavors.webdataset.structs import ShardInfo

from data_pipeline.errors import DatasetError
from data_pipeline.tar_members import TarError, iterate_samples

logger = logging.getLogger(__name__)

_RETRY_SECONDS = (0.5, 2.0, 8.0)
_PARALLEL_SLICES = 16


@edataclass
class RawSample(Sample):
    """The members of a sample by the end of their names (`json`, `codes.npy`), as they are in the shard."""

    parts: dict[str, bytes]
    shard: str
    entry: int = 0
    """Index of the blend entry it was read for."""


class LocalShardReader:
    """The samples of local shards by their number over all shards."""

    def __init__(self, shards: Sequence[ShardInfo], skip_unreadable: bool = False) -> None:
        """Read `shards`; a sample that stays unreadable is left out (None) or raises DatasetError."""
        self._paths = [str(shard.path.local_path()) for shard in shards]
        self._names = [shard.name for shard in shards]
        self._starts = [0, *np.cumsum([shard.count for shard in shards]).tolist()]
        self._skip_unreadable = skip_unreadable
        self._open: dict[int, tuple[Any, np.ndarray]] = {}

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """Read a sample; transient errors of the file system are tried again."""
        shard = bisect_right(self._starts, index) - 1
        for wait in (*_RETRY_SECONDS, None):
            try:
                return self._read(shard, index)
            except OSError as error:
                self._open.pop(shard, None)
                if wait is not None and not isinstance(error, FileNotFoundError):
                    time.sleep(wait)
                    continue
                reason = str(error)
            except ValueError as error:
                reason = str(error)
            break
        message = f"{self._paths[shard]}: sample {index - self._starts[shard]} cannot be read: {reason}"
        if not self._skip_unreadable:
            raise DatasetError(message)
        logger.warning("skipped: %s", message)
        return None

    def _read(self, shard: int, index: int) -> dict[str, Any]:
        file, offsets = self._open_shard(shard)
        number = index - self._starts[shard]
        start, end = int(offsets[number]), int(offsets[number + 1])
        data = os.pread(file.fileno(), end - start, start)
        if len(data) < end - start:
            raise TarError("truncated: the shard is shorter than its index says")
        samples = list(iterate_samples(io.BytesIO(data), fragment=True))
        if len(samples) != 1:
            raise TarError(f"{len(samples)} samples where the index has one; prepare the data set again")
        key, parts = samples[0]
        return {"key": key, "parts": parts, "shard": self._paths[shard], "restore_key": ("Webdataset", index)}

    def _open_shard(self, shard: int) -> tuple[Any, np.ndarray]:
        opened = self._open.pop(shard, None)
        if opened is None:
            path = self._paths[shard]
            opened = open(path, "rb", buffering=0), np.fromfile(f"{path}.idx", dtype="<u8")
            if len(self._open) > _PARALLEL_SLICES:
                self._open.pop(next(iter(self._open)))
        self._open[shard] = opened  # last in the order of use
        return opened


class _RemoteShardReader:
    """The same through Energon's reader."""

    def __init__(self, folder: EPath, shards: Sequence[ShardInfo]) -> None:
        self._reader = ShardInfosITarReader(folder, list(shards), itar_cache_size=_PARALLEL_SLICES)
        self._folder = str(folder)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        sample: Any = self._reader[index]
        parts = {name: data for name, data in sample.items() if not name.startswith("__")}
        shard = f"{self._folder}/{sample['__shard__']}"
        return {
            "key": sample["__key__"],
            "parts": parts,
            "shard": shard,
            "restore_key": ("Webdataset", index),
        }


class _ShardDataset(WebdatasetSampleLoaderDataset):
    """Energon's shuffling over slices of shards, yielding `RawSample`."""

    def __init__(self, entry: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._entry = entry

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
        super().__init__(
            EPath(path),
            split_part="train",
            training=training,
            worker_config=worker_config,
            max_samples_per_sequence=slice_length if training else None,
        )
        self.entry = entry
        self.skip_unreadable = skip_unreadable

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset[RawSample]:
        """Divide the samples over ranks and workers as Energon does and read them with the reader above."""
        slices = self.shard_workers(
            self.shards,
            worker_config=self.worker_config,
            max_samples_per_sequence=self.max_samples_per_sequence,
            rotation_offset=worker_rotation_offset,
        )
        local = self.path.is_local()
        reader: Any = (
            LocalShardReader(self.shards, self.skip_unreadable)
            if local
            else _RemoteShardReader(self.path, self.shards)
        )
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
