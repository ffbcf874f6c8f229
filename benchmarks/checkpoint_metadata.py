"""Checkpoints at many ranks: seconds that metadata calls cost at a start and at a save, before and after.

`python -m benchmarks.checkpoint_metadata [--ranks 1024] [--files 16] [--checkpoints 5] [--milliseconds 5]`

Nothing sleeps: the calls of the main process and of one other rank on real folders are counted, and a call is
taken to cost so many milliseconds. Ranks work at the same time: of a start the slower of the two counts, of a
save the main process, which has the longest part. "Before" is what this project did first: every rank looks
at the size of every file of every checkpoint, the main process syncs and removes all, and nobody hashes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.finding import content_of, file_of_rank, find_checkpoint
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.config import JobConfig
from pretrain.runtime import Runtime

COUNTED = ("stat", "open", "fsync", "scandir", "listdir", "replace", "rename", "unlink", "mkdir", "rmdir")
OTHER_RANK = 1


class SimulatedRank(Runtime):
    """One of many ranks without the others: what the main process sent is kept and given to the next one."""

    sent: list[Any]
    folder: Path | None = None

    def from_main(self, value: Any) -> Any:
        """What the main process said at this place."""
        if self.is_main:
            self.sent.append(value)
            return value
        return self.sent.pop(0)

    def share_out(self, values: Any) -> Any:
        """This rank's part."""
        if self.is_main:
            self.sent.append(values[OTHER_RANK])
            return values[0]
        return self.sent.pop(0)

    def to_main(self, value: Any) -> list[Any]:
        """Its own alone: those of the others need no file."""
        return [value] if self.is_main else []

    def barrier(self) -> None:
        """The others are always there; of a checkpoint that goes they have removed their files."""
        if not self.is_main or self.folder is None:
            return
        with not_counted():
            for going in self.folder.glob(".removing_*"):
                if not (going / "rank_00000.json").exists():  # this process has done its part
                    for file in going.rglob("*.*"):
                        file.unlink()


def files_of(rank: int, files: int) -> list[str]:
    """A rank's files: all but one are its engine's, which in truth has one."""
    parts = (f"model/{number}_rank_{rank:05d}.safetensors" for number in range(files - 1))
    return [file_of_rank(rank), *parts]


def write_files(folder: Path, ranks: range, files: int) -> None:
    """What other ranks write."""
    (folder / "model").mkdir(exist_ok=True)
    for rank in ranks:
        for name in files_of(rank, files):
            (folder / name).write_bytes(b"x")


calls = {"counting": False, "number": 0}


@contextlib.contextmanager
def not_counted() -> Iterator[None]:
    """Leave out what stands for work of others."""
    before, calls["counting"] = calls["counting"], False
    yield
    calls["counting"] = before


def count_calls() -> None:
    """From here on count the metadata calls of this process."""

    def counting(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls["number"] += calls["counting"]
            return function(*args, **kwargs)

        return call

    for name in COUNTED:
        setattr(os, name, counting(getattr(os, name)))
    import io

    io.open = counting(io.open)  # type: ignore[assignment]  # what Path.open calls


def counted(work: Callable[[], Any]) -> int:
    """Metadata calls of some work."""
    calls.update(counting=True, number=0)
    work()
    calls["counting"] = False
    return int(calls["number"])


def before_start(folder: Path) -> None:
    """Every rank: the sizes of all files of all checkpoints."""
    for path in folder.glob("step_*"):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        all((path / name).is_file() and (path / name).stat().st_size >= 0 for name in state["files"])


def before_save(folder: Path, temporary: Path) -> None:
    """The main process: find, sync and measure all files, look through all checkpoints, remove the oldest."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    (temporary / "state.json").write_text(json.dumps({"files": sizes, "written": 99.0}), encoding="utf-8")
    os.replace(temporary, folder / "step_00000099")
    before_start(folder)
    shutil.rmtree(min(folder.glob("step_*")))


def main() -> None:
    """Print a table of calls and seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--files", type=int, default=16, help="of each rank in a checkpoint")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--milliseconds", type=float, default=5.0, help="that a metadata call costs")
    options = parser.parse_args()
    sent: list[Any] = []

    def rank(number: int, step: int) -> SimulatedRank:
        device = torch.device("cpu")
        made = SimulatedRank(number, 0, options.ranks, device, torch.float32, 0, 1, Path(), step=step)
        made.sent = sent
        return made

    def save(number: int, step: int, folder: Path) -> None:
        runtime = rank(number, step)
        runtime.folder = folder
        own: Any = dict.fromkeys(files_of(number, options.files), "x")
        CheckpointWriter(folder, runtime, "toy", options.checkpoints).save(own, {"engines": {}})

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        count_calls()
        for step in range(1, options.checkpoints + 1):
            save(0, step, folder)
            write_files(folder / f"step_{step:08d}", range(1, options.ranks), options.files)
            complete_hashes(folder / f"step_{step:08d}")
            sent.clear()
        config = JobConfig("toy", "unused", 1, 1, 1)
        start = {}
        start["before"] = counted(lambda: before_start(folder))
        main_calls = counted(lambda: find_checkpoint(config, folder, rank(0, 0), lambda _: None))
        other_calls = counted(lambda: find_checkpoint(config, folder, rank(1, 0), lambda _: None))
        start["after"] = max(main_calls, other_calls)
        sent.clear()
        saving = {"after": counted(lambda: save(0, 50, folder))}
        sent.clear()
        temporary = folder / ".writing_step_00000099"
        temporary.mkdir()
        write_files(temporary, range(options.ranks), options.files)
        saving["before"] = counted(lambda: before_save(folder, temporary))
    write = sys.stdout.write
    write(
        f"{options.ranks} ranks x {options.files} files, {options.checkpoints} checkpoints, "
        f"{options.milliseconds:g} ms a call\n"
    )
    for name, numbers in (("start", start), ("save", saving)):
        cost = {key: number * options.milliseconds / 1000 for key, number in numbers.items()}
        write(
            f"{name}: before {numbers['before']:,} calls, {cost['before']:,.1f} s; "
            f"after {numbers['after']:,} calls, {cost['after']:,.1f} s; "
            f"{numbers['before'] / numbers['after']:,.0f} times as fast\n"
        )


def complete_hashes(path: Path) -> None:
    """Enter the files of the ranks that were not there, as their part of a save would have."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name != "state.json":
            state["files"].setdefault(name, content_of(file))
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")


if __name__ == "__main__":
    main()
