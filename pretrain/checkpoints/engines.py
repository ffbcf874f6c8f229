"""Engines and rank states to the files of a checkpoint, and back into engines of any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from data_pipeline.streams.plain_state import from_plain, to_plain
from pretrain.checkpoints.finding import (
    CONTENTS,
    FORMAT_VERSION,
    SHARED,
    STATE_FILE,
    CheckpointError,
    file_of_rank,
    read_state,
)
from pretrain.checkpoints.fragments import FragmentReader, Fragments, Index, read_index
from pretrain.checkpoints.pieces import (
    Piece,
    contents,
    counters,
    finish_loading,
    own_pieces,
    prepare_loading,
    shared_pieces,
)
from pretrain.checkpoints.writer import Files
from pretrain.config import ConfigError
from pretrain.runtime import Runtime


@dataclass(frozen=True)
class RankStates:
    """What ranks kept besides their engines."""

    states: list[dict[str, Any]]  # this rank's alone, or those of all old ranks if there were more or fewer
    same_ranks: bool

    def own(self, rank: int) -> dict[str, Any] | None:
        """That of this rank, None if it is new."""
        if self.same_ranks:
            return self.states[0]
        return self.states[rank] if rank < len(self.states) else None


def engine_files(
    engines: Mapping[str, DeepSpeedEngine], rank_state: dict[str, Any], runtime: Runtime
) -> tuple[Files, dict[str, dict[str, Any]]]:
    """Copy to host memory what this rank writes of a checkpoint; every rank calls, none waits for another.

    Args:
        engines: by name.
        rank_state: what this rank needs besides, of plain values, arrays and tensors.
        runtime: rank.

    Returns:
        Files by their path, and what `state.json` says of each engine.
    """
    files: Files = {file_of_rank(runtime.rank): json.dumps(to_plain(rank_state))}
    about = {}
    for name, engine in engines.items():
        files[file_of_rank(runtime.rank, name)] = _copied(own_pieces(engine))
        if runtime.is_main:
            files[f"{name}/{SHARED}"] = _copied(shared_pieces(engine))
            files[f"{name}/{CONTENTS}"] = json.dumps(contents(engine), indent=1)
        about[name] = {"zero": engine.zero_optimization_stage(), **counters(engine)}
    if runtime.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return files, about


def _copied(pieces: list[Piece]) -> Fragments:
    """Pieces in host memory; of a GPU they are complete after a synchronisation."""
    tensors = {}
    for piece in pieces:
        flat = piece.tensor.detach().reshape(-1)
        host = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=flat.is_cuda)
        tensors[piece.key] = host.copy_(flat, non_blocking=True)
    return Fragments(tensors, {piece.key: piece.start for piece in pieces})


def load_checkpoint(
    path: Path, runtime: Runtime, engines: Mapping[str, DeepSpeedEngine], job: str
) -> RankStates:
    """Load engines in place, also those of another number of ranks or another ZeRO level; every rank calls.

    Masters, optimizer states, frozen parameters and buffers are those of the checkpoint to the bit.

    Raises:
        ConfigError: another job's checkpoint, other engines or parameters.
        CheckpointError: its files lack a part.
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
    if state["job"] != job or state["engines"].keys() != engines.keys():
        raise ConfigError(
            f"{path} was written by job {state['job']} with engines {', '.join(state['engines']) or 'none'}; "
            f"expected job {job} with {', '.join(engines) or 'none'}"
        )
    same_ranks = state["world_size"] == runtime.world_size
    for name, engine in engines.items():
        _require_same_parts(path / name, engine, runtime)
        saved = state["engines"][name]
        same_cuts = same_ranks and saved["zero"] == engine.zero_optimization_stage()
        _load_engine(path, name, engine, saved, state["world_size"], same_cuts, runtime)
    runtime.step = state["step"]
    same_ranks = same_ranks and state.get("data_ranks", state["world_size"]) == runtime.data_ranks
    return _rank_states(path, state["world_size"], same_ranks, runtime)


def _require_same_parts(folder: Path, engine: DeepSpeedEngine, runtime: Runtime) -> None:
    """Raise ConfigError unless parameters and buffers have the names and shapes of the checkpoint's."""
    saved = None
    if runtime.is_main:
        saved = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
    saved, here = runtime.from_main(saved), contents(engine)
    for part in ("parameters", "buffers"):
        before, now = saved[part], here[part]
        if missing := sorted(before.keys() ^ now.keys()):
            where = "the checkpoint" if missing[0] in before else "this run"
            raise ConfigError(
                f"{folder}: {len(missing)} {part} differ, first {missing[0]}, which only {where} has; go on "
                "with the settings of the run that wrote it (model.*), or take another run_dir"
            )
        for name, about in now.items():
            for what in ("shape", "trained"):
                if about.get(what) != before[name].get(what):
                    raise ConfigError(
                        f"{folder}: {name} has {what} {before[name].get(what)} there and {about.get(what)} "
                        "in this run; go on with the settings of the run that wrote it, or take another "
                        "run_dir"
                    )


def _load_engine(
    path: Path,
    name: str,
    engine: DeepSpeedEngine,
    saved: dict[str, Any],
    old_ranks: int,
    same_cuts: bool,
    runtime: Runtime,
) -> None:
    """Fill an engine from its files: this rank's own and the shared one where nothing was cut differently."""
    if same_cuts:
        index = read_index(path, [file_of_rank(runtime.rank, name), f"{name}/{SHARED}"])
    else:
        found: Index = {}
        if runtime.is_main:
            ranks = [file_of_rank(rank, name) for rank in range(old_ranks)]
            found = read_index(path, [*ranks, f"{name}/{SHARED}"])
        index = runtime.from_main(found)
    reader = FragmentReader(path, index)
    kinds = runtime.from_main({key.partition("/")[0] for key in index})
    prepare_loading(engine, kinds, saved["adam_steps"])
    try:
        for piece in (*own_pieces(engine), *shared_pieces(engine)):
            values = reader.read(piece.key, piece.start, piece.start + piece.tensor.numel())
            piece.tensor.copy_(values.view_as(piece.tensor))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    finish_loading(engine, saved)


def _rank_states(path: Path, old_ranks: int, same: bool, runtime: Runtime) -> RankStates:
    """This rank's own state; where ranks are not the `same`, all, read once by the main process."""

    def read(rank: int) -> Any:
        return json.loads((path / file_of_rank(rank)).read_text(encoding="utf-8"))

    if same:
        plain = [read(runtime.rank)]
    else:
        plain = runtime.from_main([read(rank) for rank in range(old_ranks)] if runtime.is_main else [])
    return RankStates([from_plain(state) for state in plain], same)
