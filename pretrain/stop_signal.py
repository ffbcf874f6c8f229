"""SIGTERM and SIGUSR1: stop after the step, with a checkpoint."""

from __future__ import annotations

import signal
from typing import Any


class StopSignal:
    """Notes that this process was asked to stop; the loop looks after each step."""

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal

    def listen(self, *numbers: signal.Signals) -> StopSignal:
        """From now on these signals are noted; before, they would end the process."""
        for number in numbers:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: Any) -> None:
        self.name = signal.Signals(number).name
