"""Checkpoints that are whole or absent: engines, loader, random state and task state of every rank."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from pretrain.config import ConfigError, JobConfig
from pretrain.runtime import Runtime

FORMAT_VERSION = 1
STATE_FILE = "state.json"


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
        rank_state: What this rank needs besides; anything pickle takes.
        job: Name of the job, so that another job does not load it.
        keep: Checkpoints to keep, this one included.

    Returns:
        The step's folder.
    """
    final = folder / f"step_{runtime.step:08d}"
    temporary = folder / f".writing_{final.name}"
    if runtime.is_main:
        for leftover in folder.glob(".writing_*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    runtime.barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(temporary), tag=name, save_latest=False)
    torch.save(rank_state, temporary / _rank_file(runtime.rank))
    runtime.barrier()
    if runtime.is_main:
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in files:
            _sync(path)
        state = {
            "format_version": FORMAT_VERSION,
            "job": job,
            "step": runtime.step,
            "world_size": runtime.world_size,
            "written": time.time(),
            "engines": {name: _layout(engine) for name, engine in engines.items()},
            "files": {str(path.relative_to(temporary)): path.stat().st_size for path in files},
        }
        _write_text(temporary / STATE_FILE, json.dumps(state, indent=1))
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _write_text(folder / "latest.tmp", final.name)
        os.replace(folder / "latest.tmp", folder / "latest")
        for old in complete_checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    runtime.barrier()
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Step folders that hold all their files at their full size, the one written last first."""
    found = []
    for path in folder.glob("step_*"):
        state = read_state(path)
        if state is not None and all(_has_size(path / name, size) for name, size in state["files"].items()):
            found.append((state["written"], path))
    return [path for _, path in sorted(found, reverse=True)]


def read_state(path: Path) -> dict[str, Any] | None:
    """What a step folder says about itself, or None if it is not a checkpoint."""
    try:
        return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def find_checkpoint(config: JobConfig, folder: Path) -> Path | None:
    """The checkpoint that `config.resume` means; None for a fresh start.

    Raises:
        ConfigError: `resume=never` on a folder that has checkpoints, or a path that is not a complete one.
    """
    own = complete_checkpoints(folder)
    if config.resume == "never":
        if own:
            raise ConfigError(
                f"resume=never, but {folder} holds {own[0].name}: two runs would be mixed; "
                "take another run_dir or remove that folder"
            )
        return None
    if config.resume == "auto":
        return own[0] if own else None
    path = Path(config.resume)
    if path.resolve() not in [candidate.resolve() for candidate in complete_checkpoints(path.parent)]:
        raise ConfigError(f"resume={path}: expected auto, never or the folder of a complete checkpoint")
    return path


def load_checkpoint(
    path: Path, runtime: Runtime, engines: Mapping[str, DeepSpeedEngine], job: str
) -> dict[str, Any]:
    """Load engines in place and return this rank's state; every rank has to call.

    Raises:
        ConfigError: another job's checkpoint, other engines, or one of another number of ranks.
    """
    state = read_state(path)
    if state is None:
        raise ConfigError(f"{path} is not a checkpoint: it has no {STATE_FILE}")
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
    # Written by this program into this run's folder; it holds loader states, which are objects.
    return torch.load(path / _rank_file(runtime.rank), map_location="cpu", weights_only=False)


def _layout(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What an engine's checkpoint files depend on, besides the model and the number of ranks."""
    return {"zero": engine.zero_optimization_stage(), "bf16": engine.bfloat16_enabled()}


def _in_words(layouts: Mapping[str, dict[str, Any]]) -> str:
    words = [f"{k} (ZeRO-{v['zero']}, {'bf16' if v['bf16'] else 'fp32'})" for k, v in layouts.items()]
    return ", ".join(words) or "none"


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
