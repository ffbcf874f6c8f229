"""Saved places in a stream: whether they fit, and what a rank takes from those of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STATE_VERSION = 4


def states_for(
    states: Sequence[dict[str, Any]], identity: dict[str, Any], rank: int, world_size: int
) -> list[dict[str, Any]]:
    """Return the states that a rank goes on from: its own on the same number of ranks, else all, by rank.

    Args:
        states: What ranks saved at the same step: all of them, or only this one on as many ranks.
        identity: What must be as it was when they were saved.
        rank: This rank.
        world_size: Number of ranks now.

    Raises:
        ValueError: They are of another version, settings, data, run or step, or some are missing.
    """
    for state in states:
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"loader state has version {state.get('version')}, expected {STATE_VERSION}: go on with the "
                "program that wrote it, or start anew"
            )
        for name, expected in identity.items():
            if state["identity"].get(name) != expected:
                raise ValueError(
                    f"loader state was saved with {name}={state['identity'].get(name)}, this loader has "
                    f"{name}={expected}; resume with the same data settings"
                )
    common = ("began", "world_size", "dealt")
    if not states or any(state[name] != states[0][name] for state in states for name in common):
        raise ValueError(f"got {len(states)} loader state(s) that are not of one run and step")
    by_rank = {state["rank"]: state for state in states}
    saved = states[0]["world_size"]
    if saved == world_size and rank in by_rank:
        return [by_rank[rank]]
    if sorted(by_rank) != list(range(saved)):
        raise ValueError(
            f"got the loader states of ranks {sorted(by_rank)}, expected those of all {saved}; a rank's own "
            "is enough only on as many ranks"
        )
    return [by_rank[rank] for rank in range(saved)]


def furthest_places(states: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return each reader's place by its turn; of a reader that several ranks read, the furthest.

    None of them is beyond what all ranks together have used up.
    """
    places: dict[int, dict[str, Any]] = {}
    for state in states:
        for turn, place in state["readers"]:
            if turn not in places or place["batches"] > places[turn]["batches"]:
                places[turn] = place
    return places


def added_up(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add counts, lists of counts and counts by name."""
    total: dict[str, Any] = {}
    for name, value in items[0].items():
        if isinstance(value, list):
            total[name] = [sum(item[name][index] for item in items) for index in range(len(value))]
        elif isinstance(value, dict):
            keys = {key for item in items for key in item[name]}
            total[name] = {key: sum(item[name].get(key, 0) for item in items) for key in sorted(keys)}
        else:
            total[name] = sum(item[name] for item in items)
    return total
