"""Saved places in a stream for another number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.energon.savable_loader import SavableDataLoaderState

from data_pipeline.streams.plain_state import from_plain, to_plain


def redistribute_states(
    states: Sequence[dict[str, Any]], world_size: int, num_workers: int
) -> list[dict[str, Any]]:
    """Turn the loader states of all ranks into those of another number of ranks and workers.

    A reader, the worker of a rank, owns a share of the samples, its shuffling and its waiting documents, so
    the readers stay what they are and only change ranks: 2 ranks x 2 workers become 4 x 1 or 1 x 4. What
    follows is what would have followed, no sample twice and none lost; where each rank has taken the same
    number of batches from each of its workers, in the same order too. `energon checkpoint redist` does the
    same.

    Args:
        states: Of rank 0, 1, ..., saved at the same step.
        world_size: New number of ranks.
        num_workers: New number of workers per rank.

    Returns:
        A state for each new rank. Statistics are added up and given to rank 0.

    Raises:
        ValueError: The states are not those of all ranks of one run, ranks read without workers, or the
            number of readers is another.
    """
    common = _common_identity(states, world_size, num_workers)
    loaded = [from_plain(state["energon"]) for state in states]
    energon: list[SavableDataLoaderState | None] = [None] * world_size  # where nothing has been read yet
    if all(state is not None for state in loaded):
        readers = [reader for state in loaded for reader in state.worker_states]
        energon = [
            SavableDataLoaderState(
                worker_states=readers[rank * num_workers : (rank + 1) * num_workers],
                next_worker_id=0,
                micro_batch_size=loaded[0].micro_batch_size,
            )
            for rank in range(world_size)
        ]
    identity = {**common, "world_size": world_size, "num_workers": num_workers}
    new: list[dict[str, Any]] = [
        {**states[0], "identity": {**identity, "rank": rank}, "energon": to_plain(energon[rank])}
        for rank in range(world_size)
    ]
    if "statistics" in states[0]:
        statistics = [state["statistics"] for state in states]
        for rank, state in enumerate(new):
            state["statistics"] = _added_up(statistics if rank == 0 else statistics[:0], statistics[0])
    return new


def _common_identity(states: Sequence[dict[str, Any]], world_size: int, num_workers: int) -> dict[str, Any]:
    """Return the identity of the run without the rank; ValueError if its states cannot be moved."""
    identities = [dict(state["identity"]) for state in states]
    ranks = [identity.pop("rank") for identity in identities]
    if not states or any(identity != identities[0] for identity in identities):
        raise ValueError(
            f"got {len(states)} states of different runs; expected those of all ranks of one run"
        )
    common = identities[0]
    if ranks != list(range(common["world_size"])):
        raise ValueError(
            f"got the states of ranks {ranks}, expected those of all {common['world_size']} in their order"
        )
    old = f"{common['world_size']} ranks x {common['num_workers']} workers"
    if min(world_size, num_workers, common["num_workers"]) < 1:
        raise ValueError(
            f"cannot go from {old} to {world_size} x {num_workers}: a rank that reads by itself (0 workers) "
            "keeps its place in another form; start training with 1 worker or more"
        )
    if world_size * num_workers != common["world_size"] * common["num_workers"]:
        raise ValueError(
            f"cannot go from {old} to {world_size} x {num_workers}: each reader has its own share of the "
            "samples, so ranks x workers has to stay the same"
        )
    return common


def _added_up(items: Sequence[dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    """Add counts, lists of counts and counts by name; zeros in the form of `like` where there are none."""
    total: dict[str, Any] = {}
    for name, value in like.items():
        if isinstance(value, list):
            total[name] = [sum(item[name][index] for item in items) for index in range(len(value))]
        elif isinstance(value, dict):
            keys = {key for item in items for key in item[name]}
            total[name] = {key: sum(item[name].get(key, 0) for item in items) for key in sorted(keys)}
        else:
            total[name] = sum(item[name] for item in items)
    return total
