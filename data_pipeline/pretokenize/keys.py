"""Whether keys repeat from shard to shard, as far as that can be told while shards are being made.

Whether all keys are unique is seen only in the index, at the end. Where they repeat, the first or last one of
a shard mostly does: those of finished shards are kept, in a file each, for all workers.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from data_pipeline.errors import DatasetError
from data_pipeline.pretokenize.claims import link_once
from data_pipeline.shards.code_shards import temporary_name


class EdgeKeys:
    """The first and last keys of finished shards, and of this worker's shards on their way."""

    def __init__(self, folder: Path, output: Path) -> None:
        """Keep them in `folder`; `output` is the data set's, for messages."""
        self.folder, self.output = folder, output
        self._own: dict[str, str] = {}

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()

    def check(self, key: str, name: str) -> None:
        """Remember a key of the shard `name`; DatasetError if another shard has it too."""
        other = self._own.setdefault(key, name)
        with contextlib.suppress(FileNotFoundError):
            other = self._path(key).read_text(encoding="utf-8")
        if other != name:
            raise DatasetError(
                f"{self.output}: key {key} occurs more than once, in {other} and {name}; keys must be "
                "unique in a data set: use --prefix-keys and another output folder"
            )

    def note(self, key: str, name: str) -> None:
        """Let all workers know a key of the finished shard `name`; DatasetError if another one has it."""
        own = temporary_name(self._path(key))
        own.write_text(name, encoding="utf-8")
        link_once(own, self._path(key))
        own.unlink()
        self.check(key, name)
