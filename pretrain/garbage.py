"""Python's garbage is collected by all ranks at the same steps, not by each whenever it comes to it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collected_every(steps: int) -> Iterator[Callable[[int], None]]:
    """Collect garbage when the function that is given is called with a step that is due; otherwise not.

    A collection stops a process while it looks at all objects, and the other ranks then wait for it in the
    next collective: many ranks, each with its own moments, are always waiting for one (torchtitan's
    `gc_freq`). What is there before, such as modules and the model, stays and is not looked at again.

    Args:
        steps: Steps from one collection to the next; 0 leaves it to Python.
    """
    if steps == 0 or not gc.isenabled():
        yield lambda step: None
        return

    def collect(step: int) -> None:
        if step % steps == 0:
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()
