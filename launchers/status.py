"""Whether the run in a folder lives, for a person or a script that looks from outside."""

from __future__ import annotations

import time
from pathlib import Path

from launchers.errors import UserError
from pretrain.heartbeat import HEARTBEAT_FILE, in_words, read_heartbeat, state_of

WELL = ("running", "finished", "stopped")


def status(run: Path) -> tuple[str, bool]:
    """A line on the run, and whether it runs or has ended in order.

    Raises:
        UserError: the folder has no sign of life.
    """
    beat = read_heartbeat(run)
    if beat is None:
        raise UserError(f"{run} has no {HEARTBEAT_FILE}: expected a run_dir in which a training was started")
    now = time.time()
    return in_words(beat, now), state_of(beat, now) in WELL
