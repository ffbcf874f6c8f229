"""Writing a checkpoint: a copy to host memory, files in the background, one name for all at the end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pretrain.checkpoints.finding import (
    ASSETS,
    FORMAT_VERSION,
    STATE_FILE,
    CheckpointError,
    complete_checkpoints,
    content_of,
    writer_of,
)
from pretrain.checkpoints.fragments import Fragments
from pretrain.runtime import Runtime

logger = logging.getLogger(__name__)

Files = dict[str, Fragments | str]  # by path in the step's folder: tensors, or text


@dataclass
class _Writing:
    """A checkpoint on its way to the disk."""

    step: int
    state: dict[str, Any]
    temporary: Path
    thread: threading.Thread = field(init=False)
    written: dict[str, Any] = field(default_factory=dict)  # size and hash of each of this rank's files
    problem: str = ""


class CheckpointWriter:
    """Writes the checkpoints of a run into `folder/step_XXXXXXXX`.

    All files go into a folder with a temporary name, which is renamed when every rank has written, synced and
    hashed its own; `latest` moves after that, and the oldest checkpoints beyond `keep` are removed last. A
    kill at any moment, or a full disk, leaves the previous checkpoint as it was. What a rank writes it has
    copied to host memory first: training goes on meanwhile, and needs that much more of it.

    `save` and `finish` are for every rank to call, at the same step.
    """

    def __init__(self, folder: Path, runtime: Runtime, job: str, keep: int) -> None:
        """Keep `keep` checkpoints in `folder`, on a file system that all ranks share."""
        self.folder = folder
        self.runtime = runtime
        self.job = job
        self.keep = keep
        self._writing: _Writing | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is not complete yet, on this rank and on all."""
        return self._writing is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes files."""
        return self._writing is not None and self._writing.thread.is_alive()

    def save(
        self,
        files: Files,
        about: Mapping[str, Any],
        assets: Callable[[Path], None] | None = None,
        background: bool = False,
    ) -> None:
        """Write a checkpoint of this step, after the one before is complete.

        Args:
            files: this rank's, on the CPU, nobody else's to change.
            about: what `state.json` tells besides, of the engines for example.
            assets: fills a folder with what a model folder has besides weights; called on the main process.
            background: return at once; `finish` completes the checkpoint when no rank is `busy` any more.

        Raises:
            CheckpointError: writing failed, because the disk is full for example; earlier ones are whole.
        """
        self.finish()
        step = self.runtime.step
        temporary = self.folder / f".writing_step_{step:08d}"
        state = {
            "format_version": FORMAT_VERSION,
            "job": self.job,
            "step": step,
            "world_size": self.runtime.world_size,
            "data_ranks": self.runtime.data_ranks,
            **about,
        }
        problem = ""
        if self.runtime.is_main:
            try:
                remove_leftovers(self.folder)
                temporary.mkdir(parents=True)
                for name in {Path(name).parent for name in files}:
                    (temporary / name).mkdir(exist_ok=True)
                if assets is not None:
                    (temporary / ASSETS).mkdir()
                    assets(temporary / ASSETS)
            except OSError as error:
                problem = str(error)
        self._raise_together(step, problem)
        self._writing = writing = _Writing(step, state, temporary)
        writing.thread = threading.Thread(target=self._write, args=(writing, files), daemon=True)
        writing.thread.start()
        if not background:
            self.finish()

    def finish(self) -> Path | None:
        """Wait for the files of all ranks and give the checkpoint its name; None if there was none to finish.

        Raises:
            CheckpointError: see `save`; a failure in the background is told here.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        writing.thread.join()
        self._raise_together(writing.step, writing.problem)
        parts = self.runtime.to_main(writing.written)
        final, old, problem = self.folder / f"step_{writing.step:08d}", [], ""
        if self.runtime.is_main:
            try:
                self._name(
                    writing, final, {name: content for part in parts for name, content in part.items()}
                )
                old = complete_checkpoints(self.folder)[self.keep :]
            except OSError as error:
                problem = str(error)
        self._raise_together(writing.step, problem)
        remove_together(self.folder, self.runtime.from_main(old), self.runtime)
        return final

    def _write(self, writing: _Writing, files: Files) -> None:
        """Write, sync and hash this rank's files, and on the main process what `assets` made."""
        try:
            for name, content in files.items():
                path = writing.temporary / name
                if isinstance(content, Fragments):
                    content.write(path)
                else:
                    path.write_text(content, encoding="utf-8")
            made = [writing.temporary / name for name in files]
            if self.runtime.is_main:
                made += [path for path in (writing.temporary / ASSETS).rglob("*") if path.is_file()]
            for path in made:
                sync(path)
                writing.written[path.relative_to(writing.temporary).as_posix()] = content_of(path)
        except (OSError, SafetensorError) as error:  # that of safetensors for a full disk
            writing.problem = str(error)
        except Exception as error:  # told by the main thread, which would wait for nothing otherwise
            writing.problem = f"{type(error).__name__}: {error}"

    def _name(self, writing: _Writing, final: Path, files: dict[str, Any]) -> None:
        temporary = writing.temporary
        state = {**writing.state, "written": time.time(), "files": dict(sorted(files.items()))}
        write_text(temporary / STATE_FILE, json.dumps(state, indent=1))
        for name in sorted({Path(name).parent.as_posix() for name in files}):
            sync(temporary / name)
        sync(temporary)
        if final.exists():
            os.replace(final, self.folder / f".removing_{final.name}")
        os.replace(temporary, final)
        write_text(self.folder / "latest.tmp", final.name)
        os.replace(self.folder / "latest.tmp", self.folder / "latest")
        sync(self.folder)
        shutil.rmtree(self.folder / f".removing_{final.name}", ignore_errors=True)

    def _raise_together(self, step: int, problem: str) -> None:
        """Raise on every rank what went wrong on one: the others would wait for it."""
        if first := self.runtime.first_of_all(problem and f"rank {self.runtime.rank}: {problem}"):
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({first}); earlier "
                "ones are untouched. Make room, and start the same command again: it goes on from the newest"
            )


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed or failed process left half written or half removed; for the main process."""
    for pattern in (".writing_*", ".removing_*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)


def remove_together(folder: Path, checkpoints: list[Path], runtime: Runtime) -> None:
    """Remove checkpoints, every rank those of their files that have its number.

    No error of a file system ends a run for an old checkpoint: what is left is a leftover to the next one.
    """
    for path in checkpoints:
        going = folder / f".removing_{path.name}"
        try:
            if runtime.is_main:
                os.replace(path, going)
        except OSError as error:
            logger.warning("an old checkpoint stays for now: %s", error)
        runtime.barrier()
        with contextlib.suppress(OSError):
            with os.scandir(going) as entries:
                places = [going, *(Path(entry.path) for entry in entries if entry.is_dir())]
            for place in places:
                with os.scandir(place) as entries:
                    own = [e.path for e in entries if e.is_file() and writer_of(e.name) == runtime.rank]
                for file in own:
                    os.unlink(file)
        runtime.barrier()
        if runtime.is_main:
            shutil.rmtree(going, ignore_errors=True)
    if checkpoints:
        runtime.barrier()


def write_text(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
