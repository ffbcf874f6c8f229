"""Which checkpoint to go on from: the newest whose files are what was written.

A step folder gets its name when all its files are on the disk, with their hashes in `state.json`. The main
process alone looks which checkpoints there are, and every rank checks the files with its number: at many
ranks metadata calls are what costs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pretrain.config import ConfigError, JobConfig

if TYPE_CHECKING:  # who converts a checkpoint needs no DeepSpeed
    from pretrain.runtime import Runtime

FORMAT_VERSION = 3
STATE_FILE = "state.json"
ASSETS = "assets"  # folder of what an export has besides weights
CONTENTS = "contents.json"  # of an engine: names, shapes and types of what it holds
SHARED = "shared.safetensors"  # of an engine: what all ranks keep whole, written by the main one
_OF_RANK = re.compile(r"(?:^|_|/)rank_(\d+)[_.]")  # in the names of files that one rank wrote


class CheckpointError(OSError):
    """A checkpoint that could not be written, or no longer is what was written; one line for the user."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Step folders that were written to their end, the one written last first; contents are not looked at."""
    found = []
    for path in folder.glob("step_*"):
        state = read_state(path)
        if state is not None:
            found.append((state["written"], path))
    return [path for _, path in sorted(found, reverse=True)]


def read_state(path: Path) -> dict[str, Any] | None:
    """What a step folder says about itself, or None if it is not a checkpoint."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"written", "files"} <= state.keys() else None


def find_checkpoint(
    config: JobConfig, folder: Path, runtime: Runtime, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint that `config.resume` means; None for a fresh start. Every rank has to call.

    With `auto` it is the newest one whose files have the hashes they were written with; others are passed
    over, and `say` gets a line for each. Damaged ones are set aside under another name, so that they are not
    among those that are kept; of these the last stays for whoever wants to look.

    Raises:
        ConfigError: `resume=never` on a folder that has checkpoints, or a path that is not a complete one.
        CheckpointError: the checkpoint of a path, or every one there is, is damaged.
    """
    candidates: list[Path] = []
    problem, notes = "", []
    if runtime.is_main:
        candidates, notes, problem = _candidates(config, folder)
    candidates, notes, problem = runtime.from_main((candidates, notes, problem))
    for note in notes:
        say(note)
    if problem:
        raise ConfigError(problem)
    damaged: list[Path] = []
    for path in candidates:
        damage = _damage(path, runtime)
        if not damage:
            if damaged and runtime.is_main:
                _set_aside(damaged)
            return path
        say(f"{path} is damaged and passed over: {damage}")
        damaged.append(path)
    if candidates:
        raise CheckpointError(
            f"no checkpoint to resume from: {', '.join(path.name for path in candidates)} in "
            f"{candidates[0].parent} are damaged; restore one, or take another run_dir to start anew"
        )
    return None


def _set_aside(damaged: list[Path]) -> None:
    for path in damaged:
        for earlier in path.parent.glob(".damaged_*"):
            shutil.rmtree(earlier)
        os.replace(path, path.with_name(f".damaged_{path.name}"))


def starter(config: JobConfig) -> list[str]:
    """What a run is started by, the same when Slurm or torchrun starts it again."""
    return [config.resume, os.environ.get("SLURM_JOB_ID", "")]


def _since_the_first_start(config: JobConfig, folder: Path) -> list[Path]:
    """The run's own checkpoints, the newest first, if it is started again by what started it; else none."""
    by_slurm, by_torchrun = (
        os.environ.get(f"{name}_RESTART_COUNT", "") not in ("", "0") for name in ("SLURM", "TORCHELASTIC")
    )
    if not by_slurm and not by_torchrun:
        return []
    # A job of Slurm has a number; what one torchrun, our parent, has started can only be told by the time.
    begin = 0.0 if by_slurm else psutil.Process(os.getppid()).create_time()
    states = [(path, read_state(path) or {}) for path in complete_checkpoints(folder)]
    own = [(path, state) for path, state in states if state.get("started_by") == starter(config)]
    return [path for path, state in own if state["written"] >= begin]


def _candidates(config: JobConfig, folder: Path) -> tuple[list[Path], list[str], str]:
    """What may be resumed from, best first; lines about what may not; and what makes a start impossible."""
    # By the same words as the first time: to obey them once more would lose all steps since.
    if config.resume != "auto" and (since := _since_the_first_start(config, folder)):
        return since, [], ""
    if config.resume not in ("auto", "never"):
        path = Path(config.resume)
        if read_state(path) is None:
            return [], [], f"resume={path}: expected auto, never or the folder of a complete checkpoint"
        return [path], [], ""
    own = complete_checkpoints(folder)
    if config.resume == "never":
        problem = own and (
            f"resume=never, but {folder} holds {own[0].name}: two runs would be mixed; "
            "take another run_dir or remove that folder"
        )
        return [], [], problem or ""
    incomplete = sorted({*folder.glob("step_*"), *folder.glob(".writing_*")} - set(own))
    return own, [f"{path} is incomplete and passed over" for path in incomplete], ""


def _damage(path: Path, runtime: Runtime) -> str:
    """What is wrong with the first damaged file, or nothing; every rank checks those it wrote."""
    parts: list[dict[str, Any]] | None = None
    if runtime.is_main:
        parts = [{} for _ in range(runtime.world_size)]
        for name, content in (read_state(path) or {"files": {}})["files"].items():
            parts[writer_of(name) % runtime.world_size][name] = content
    own = runtime.share_out(parts).items()
    found = next(filter(None, (damage_of(path, name, expected) for name, expected in own)), "")
    return runtime.first_of_all(found)


def damage_of(folder: Path, name: str, expected: dict[str, Any]) -> str:
    """What is wrong with a file that was written with this size and hash, or nothing."""
    try:
        if content_of(folder / name) == expected:
            return ""
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return f"{name} has other contents than when it was written"


def file_of_rank(rank: int, engine: str | None = None) -> str:
    """Path in a step's folder of what a rank keeps of an engine, or besides its engines."""
    return f"rank_{rank:05d}.json" if engine is None else f"{engine}/rank_{rank:05d}.safetensors"


def writer_of(name: str) -> int:
    """The rank that wrote a file: its name says so, or it was the main one."""
    found = _OF_RANK.search(name)
    return int(found.group(1)) if found else 0


def content_of(path: Path) -> dict[str, Any]:
    """Size and hash of a file, in one reading."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}
