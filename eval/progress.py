"""A progress bar for long work, where somebody is looking."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, with a progress bar on a terminal's standard error; elsewhere without a trace."""
    from rich.console import Console
    from rich.progress import track

    hidden = not sys.stderr.isatty()
    return track(items, what, console=Console(stderr=True), transient=True, disable=hidden)
