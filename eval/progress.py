"""How far long work is: a bar where somebody looks, elsewhere lines, or nothing."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
LINE_SECONDS = 10.0


def with_progress(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, with a progress bar on a terminal's standard error; elsewhere without a trace."""
    from rich.console import Console
    from rich.progress import track

    hidden = not sys.stderr.isatty()
    return track(items, what, console=Console(stderr=True), transient=True, disable=hidden)


@contextlib.contextmanager
def counted(
    total: int, what: str, say: Callable[[str], None], bar: bool | None = None
) -> Iterator[Callable[[int], None]]:
    """Give a function that takes how many more of `total` are done; says the rate at the end.

    Args:
        total: how many there are to do; nothing is said of 0.
        what: they are, such as "answers".
        say: takes a line.
        bar: whether to draw a bar on standard error in place of lines; by default where that is a terminal.
    """
    started = said = time.monotonic()
    done = 0

    def rate() -> str:
        return f"{done / max(time.monotonic() - started, 1e-9):.1f} {what}/s"

    with contextlib.ExitStack() as stack:
        draw = _bar(total, what, stack) if (sys.stderr.isatty() if bar is None else bar) else None

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            if draw is not None:
                draw(done, rate())
            elif time.monotonic() - said > LINE_SECONDS and done < total:
                said = time.monotonic()
                say(f"{done} of {total} {what}, {rate()}")

        yield advance
    if done:
        say(f"{done} {what} in {time.monotonic() - started:.1f} s, {rate()}")


def _bar(total: int, what: str, stack: contextlib.ExitStack) -> Callable[[int, str], None]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
    task = shown.add_task(what, total=total)
    return lambda done, rate: shown.update(task, completed=done, description=rate)
