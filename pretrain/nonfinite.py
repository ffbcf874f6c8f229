"""What is told of a step that was not taken: ranks, losses, gradients, and the samples they arose from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.runtime import Runtime
from pretrain.stepping import NotFiniteError

SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True)
class BrokenRank:
    """What was not finite on one rank, and the samples of the micro-batches in which it arose."""

    rank: int
    losses: list[str]
    parameters: list[str]
    keys: list[str]
    shards: list[str]


def broken_ranks(error: NotFiniteError, micro_batches: Sequence[Any], runtime: Runtime) -> list[BrokenRank]:
    """The ranks with a loss or a gradient that is not finite, the same on all; every rank has to call."""
    chosen = [micro_batches[place] for place in error.micro_batches] or list(micro_batches)
    mine = BrokenRank(
        runtime.rank, error.losses, error.parameters, _all(chosen, "keys"), sorted({*_all(chosen, "shards")})
    )
    ranks = runtime.from_all(mine)
    return [rank for rank in ranks if rank.losses or rank.parameters]


def _all(batches: Sequence[Any], name: str) -> list[str]:
    """What batches have under a name, where it is a list of names."""
    lists = [getattr(batch, name, None) for batch in batches]
    return [word for words in lists if isinstance(words, list) for word in words]


def in_words(broken: Sequence[BrokenRank], error: NotFiniteError) -> str:
    """One line of what was not finite, where, and whether anything moved."""
    if broken:
        first = broken[0]
        what = ", ".join(_short(first.losses)) or f"the gradient of {', '.join(_short(first.parameters))}"
        where = f" on rank {first.rank}"
        if others := len(broken) - 1:
            where += f" (and something on {others} other rank(s))"
        if first.keys:
            shards = f" of {', '.join(_short(first.shards))}" if first.shards else ""
            where += f", samples {', '.join(_short(first.keys))}{shards}"
    else:  # each rank's gradients are finite by themselves
        what, where = "the sum over ranks, or the norm, of the gradients", ""
    unmoved = f"{', '.join(error.moved)} had moved by then" if error.moved else "no parameter was changed"
    return f"{what} is not finite{where}; {unmoved}"


def _short(words: Sequence[str], most: int = 3) -> list[str]:
    return [*words] if len(words) <= most + 1 else [*words[:most], f"{len(words) - most} more"]


def record_skipped(folder: Path, step: int, broken: Sequence[BrokenRank]) -> None:
    """Add a line to the run folder's skipped.jsonl; for the main process."""
    line = json.dumps({"step": step, "ranks": [asdict(rank) for rank in broken]})
    with open(folder / SKIPPED_FILE, "a", encoding="utf-8") as file:
        file.write(line + "\n")
