"""Checkpoints that are whole or absent: engines, loader, random state and task state of every rank.

A step folder gets its name when all its files are on the disk, with their hashes in `state.json`; a start
reads the newest one whose files still have them. Every rank writes, syncs, hashes and checks its own files,
and the main process alone looks which checkpoints there are: at many ranks metadata calls are what costs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from data_pipeline.streams.plain_state import from_plain, to_plain
from pretrain.config import ConfigError, JobConfig
from pretrain.runtime import Runtime

FORMAT_VERSION = 2
STATE_FILE = "state.json"
_OF_RANK = re.compile(r"(?:^|_|/)rank_(\d+)[_.]")  # in the names of files that one rank wrote


class CheckpointError(OSError):
    """A checkpoint that could not be written, or no longer is what was written; one line for the user."""


def random_state() -> dict[str, Any]:
    """State of every random generator a step may draw from."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every random generator back to `state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(
    folder: Path,
    runtime: Runtime,
    engines: Mapping[str, DeepSpeedEngine],
    rank_state: dict[str, Any],
    job: str,
    keep: int,
) -> Path:
    """Write `folder/step_XXXXXXXX`; every rank has to call.

    All files go into a folder with a temporary name, which is renamed when they are complete; `latest` moves
    after that, and the oldest checkpoints beyond `keep` are removed last. A kill at any moment leaves the
    previous checkpoint untouched.

    Args:
        folder: The run's `checkpoints` folder, on a file system that all ranks share.
        runtime: Ranks and step.
        engines: DeepSpeed engines by name; each is saved under its name.
        rank_state: What this rank needs besides, of plain values, arrays and tensors.
        job: Name of the job, so that another job does not load it.
        keep: Checkpoints to keep, this one included.

    Returns:
        The step's folder.

    Raises:
        CheckpointError: Writing failed, because the disk is full for example; earlier checkpoints are whole.
    """
    final = folder / f"step_{runtime.step:08d}"
    temporary = folder / f".writing_{final.name}"
    try:
        if runtime.is_main:
            remove_leftovers(folder)
            temporary.mkdir(parents=True)
        runtime.barrier()
        for name, engine in engines.items():
            engine.save_checkpoint(str(temporary), tag=name, save_latest=False)
        _write_text(temporary / _rank_file(runtime.rank), json.dumps(to_plain(rank_state)))
        runtime.barrier()
        written = {}
        for path in _own_files(temporary, list(engines), runtime.rank):
            _sync(path)
            written[path.relative_to(temporary).as_posix()] = _content(path)
        files = {name: content for part in runtime.to_main(written) for name, content in part.items()}
        old = []
        if runtime.is_main:
            state = {
                "format_version": FORMAT_VERSION,
                "job": job,
                "step": runtime.step,
                "world_size": runtime.world_size,
                "written": time.time(),
                "engines": {name: _layout(engine) for name, engine in engines.items()},
                "files": dict(sorted(files.items())),
            }
            _write_text(temporary / STATE_FILE, json.dumps(state, indent=1))
            for name in engines:
                _sync(temporary / name)
            _sync(temporary)
            if final.exists():
                os.replace(final, folder / f".removing_{final.name}")
            os.replace(temporary, final)
            _write_text(folder / "latest.tmp", final.name)
            os.replace(folder / "latest.tmp", folder / "latest")
            _sync(folder)
            shutil.rmtree(folder / f".removing_{final.name}", ignore_errors=True)
            old = complete_checkpoints(folder)[keep:]
    except (OSError, RuntimeError) as error:  # torch's writer has errors of its own for a full disk
        raise CheckpointError(
            f"the checkpoint of step {runtime.step} could not be written to {folder}: {error}; earlier ones "
            "are untouched. Make room, and start the same command again: it goes on from the newest"
        ) from error
    _remove(folder, runtime.from_main(old), runtime)
    return final


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed or failed process left half written or half removed; for the main process."""
    for pattern in (".writing_*", ".removing_*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)


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
    over, and `say` gets a line for each.

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
    for path in candidates:
        damage = _damage(path, runtime)
        if not damage:
            return path
        say(f"{path} is damaged and passed over: {damage}")
    if candidates:
        raise CheckpointError(
            f"no checkpoint to resume from: {', '.join(path.name for path in candidates)} in "
            f"{candidates[0].parent} are damaged; restore one, or take another run_dir to start anew"
        )
    return None


def _candidates(config: JobConfig, folder: Path) -> tuple[list[Path], list[str], str]:
    """What may be resumed from, best first; lines about what may not; and what makes a start impossible."""
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
            parts[_writer(name) % runtime.world_size][name] = content
    found = ""
    for name, expected in runtime.share_out(parts).items():
        try:
            if _content(path / name) != expected:
                found = f"{name} has other contents than when it was written"
        except OSError as error:
            found = f"{name} cannot be read ({error.strerror})"
        if found:
            break
    return runtime.from_main(next(filter(None, runtime.to_main(found)), ""))


def load_checkpoint(
    path: Path, runtime: Runtime, engines: Mapping[str, DeepSpeedEngine], job: str
) -> dict[str, Any]:
    """Load engines in place and return this rank's state; every rank has to call.

    Raises:
        ConfigError: another job's checkpoint, other engines, or one of another number of ranks.
    """
    state = read_state(path) if runtime.is_main else None
    state = runtime.from_main(state and {key: value for key, value in state.items() if key != "files"})
    if state is None:
        raise ConfigError(f"{path} is not a checkpoint: it has no {STATE_FILE}")
    if state["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format version {state['format_version']}, this program reads {FORMAT_VERSION}: go "
            "on with the version that wrote it, or take another run_dir to start anew"
        )
    layouts = {name: _layout(engine) for name, engine in engines.items()}
    if state["job"] != job or state["engines"] != layouts:
        raise ConfigError(
            f"{path} was written by job {state['job']} with engines {_in_words(state['engines'])}; "
            f"expected job {job} with {_in_words(layouts)}"
        )
    if state["world_size"] != runtime.world_size:
        raise ConfigError(
            f"{path} was written by {state['world_size']} rank(s) and this run has {runtime.world_size}: "
            f"start it with {state['world_size']}, or convert weights and optimizer state of each engine "
            "with `python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
            f"--input_folder {path}/ENGINE --output_folder OUTPUT`"
        )
    for name, engine in engines.items():
        loaded, _ = engine.load_checkpoint(str(path), tag=name)
        if loaded is None:
            raise ConfigError(f"{path / name}: DeepSpeed found no checkpoint there")
        engine.lr_scheduler.apply()  # the optimizer's saved groups brought the old settings back
    runtime.step = state["step"]
    return from_plain(json.loads((path / _rank_file(runtime.rank)).read_text(encoding="utf-8")))


def _layout(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What an engine's checkpoint files depend on, besides the model and the number of ranks."""
    return {"zero": engine.zero_optimization_stage(), "bf16": engine.bfloat16_enabled()}


def _in_words(layouts: Mapping[str, dict[str, Any]]) -> str:
    words = [f"{k} (ZeRO-{v['zero']}, {'bf16' if v['bf16'] else 'fp32'})" for k, v in layouts.items()]
    return ", ".join(words) or "none"


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def _writer(name: str) -> int:
    """The rank that wrote a file: its name says so, or it was the main one."""
    found = _OF_RANK.search(name)
    return int(found.group(1)) if found else 0


def _own_files(folder: Path, engines: list[str], rank: int) -> list[Path]:
    """The files of a step folder that a rank wrote; one listing of each folder."""
    found = []
    for place in (folder, *(folder / name for name in engines)):
        with os.scandir(place) as entries:
            found += [
                Path(entry.path) for entry in entries if entry.is_file() and _writer(entry.name) == rank
            ]
    return sorted(found)


def _content(path: Path) -> dict[str, Any]:
    """Size and hash of a file, in one reading."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _remove(folder: Path, checkpoints: list[Path], runtime: Runtime) -> None:
    """Remove checkpoints, every rank those of their files that have its number."""
    for path in checkpoints:
        going = folder / f".removing_{path.name}"
        if runtime.is_main:
            os.replace(path, going)
        runtime.barrier()
        with os.scandir(going) as entries:
            engines = [entry.name for entry in entries if entry.is_dir()]
        for file in _own_files(going, engines, runtime.rank):
            file.unlink()
        runtime.barrier()
        if runtime.is_main:
            shutil.rmtree(going)
    runtime.barrier()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
