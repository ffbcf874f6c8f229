"""`dualtoken evaluate`: tasks side by side, a process for each core at most, or in turn on several ranks."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from eval.model_files import fingerprint_of_files
from eval.ranks import place_among_ranks
from eval.results import RESULTS_FILE, TaskResult, record, write_json
from eval.tasks import OF_A_RUN, TASKS, Evaluation
from eval.understanding.registry import BENCHMARKS
from launchers import processes
from launchers.errors import UserError

MOST_WORKERS = 2  # each holds the models once


def tasks_of_a_run(asked: Evaluation) -> list[str]:
    """What is measured where no task is named: a run's own data, and its small local benchmarks."""
    return [*OF_A_RUN, *(name for name in BENCHMARKS if (asked.paths.benchmarks / name).is_dir())]


def evaluate(names: Sequence[str], asked: Evaluation) -> dict[str, Any] | None:
    """Take tasks and keep what they find in `results.json`.

    Args:
        names: of the tasks.
        asked: with what, on what, and where to.

    Returns:
        the content of `results.json`; None where other ranks are not done yet.

    Raises:
        ValueError, OSError, ImportError: whatever a task says is wrong with its inputs.
    """
    _require_one(names, asked)
    started = time.time()
    asked.say(f"measuring {', '.join(names)}")
    content: dict[str, Any] = {"tasks": {}}
    models = _models(asked)
    for result, seconds in _results(names, asked):
        content = record(asked.paths.output, result, {"models": models, "seconds": seconds})
        asked.say(f"{result.task}: {shown(result)} ({seconds:.0f} s)")
    # Results are recorded one at a time, so one rank alone sees the last one come.
    there = all(content["tasks"].get(name, {}).get("recorded", 0) >= started for name in names)
    return content if there else None


def number(value: float, unit: str) -> str:
    """A figure with its unit."""
    return f"{value:.{2 if abs(value) >= 1 or not value else 3}f} {unit}".rstrip()


def shown(result: TaskResult) -> str:
    """The figure of the table with its name and unit."""
    return (
        result.headline if result.value is None else f"{result.headline} {number(result.value, result.unit)}"
    )


def _require_one(names: Sequence[str], asked: Evaluation) -> None:
    """Files that belong to one task cannot be given to several."""
    given = {"--answers": asked.answers, "--grades": asked.grades, "--judged": asked.judged}
    for option, path in given.items():
        if path is not None and len(names) != 1:
            raise UserError(f"{option} {path} belongs to one task; got {len(names)}: {', '.join(names)}")
    if asked.answers is not None and names[0] not in BENCHMARKS:
        raise UserError(f"--answers is for {', '.join(BENCHMARKS)}; got {names[0]}")
    if asked.grades is not None and names[0] != "mmvet":
        raise UserError(f"--grades is for mmvet; got {names[0]}")


def _models(asked: Evaluation) -> dict[str, Any]:
    """Path and fingerprint of each model that is there; none where somebody's answers are scored."""
    if asked.answers is not None or asked.grades is not None:
        return {}
    folders = {
        "model": asked.paths.model,
        "visual_tokenizer": asked.paths.visual_tokenizer,
        "siglip": asked.paths.siglip,
        **({"vision_tower": asked.paths.vision_tower} if asked.paths.vision_tower else {}),
    }
    return {
        name: {"path": str(folder), "fingerprint": fingerprint_of_files(Path(folder))}
        for name, folder in folders.items()
        if (Path(folder) / "config.json").is_file()
    }


def _results(names: Sequence[str], asked: Evaluation) -> Iterator[tuple[TaskResult, float]]:
    import torch

    units = [[name] for name in names if name in OF_A_RUN]  # the others share loaded models
    if rest := [name for name in names if name not in OF_A_RUN]:
        units.append(rest)
    workers = min(MOST_WORKERS, processes.available_cores(), len(units))
    if workers == 1 or asked.world_size > 1 or torch.cuda.is_available():
        for name in names:
            yield from _take([name], asked)
        return
    # Read by the workers' torch when they start: small models gain more from a second process.
    os.environ["OMP_NUM_THREADS"] = str(processes.available_cores() // workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        with _deaf_to_interrupts():  # handed down to the workers: this process hears Ctrl-C, and ends them
            running = [pool.submit(_take, unit, asked) for unit in units]
        try:
            for future in as_completed(running):
                yield from future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.terminate()
            raise


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _take(unit: Sequence[str], asked: Evaluation) -> list[tuple[TaskResult, float]]:
    found = []
    for name in unit:
        started = time.monotonic()
        result = TASKS[name](name, asked)
        if result is not None:  # else other ranks have some of it to do
            found.append((result, time.monotonic() - started))
    return found


def run_command(names: Sequence[str], asked: Evaluation, ranks: int | None) -> None:
    """What `dualtoken evaluate` does: on several ranks of this machine by starting itself on each.

    Raises:
        UserError: the ranks failed; whatever `evaluate` raises.
    """
    import torch

    rank, world_size, local = place_among_ranks(os.environ)
    names = names or tasks_of_a_run(asked)
    if world_size == 1 and (ranks or torch.cuda.device_count() or 1) > 1:
        _start_ranks(ranks or torch.cuda.device_count())
        return
    if torch.cuda.is_available():
        # Slurm may show each task no device but its own.
        torch.cuda.set_device(0 if torch.cuda.device_count() == 1 else local)
    own = replace(asked, rank=rank, world_size=world_size)
    own.say = asked.say if world_size == 1 else partial(_say_as, f"rank {rank}: ", asked.say)
    content = evaluate(names, own)
    if content is None:
        own.say("done; the rank that ends last writes the table")
        return
    from eval.page import write_page

    content["tasks"] = {name: content["tasks"][name] for name in TASKS if name in content["tasks"]}
    print_table({name: content["tasks"][name] for name in names})
    own.say(f"{asked.paths.output / RESULTS_FILE}, {write_page(asked.paths.output, content)}")
    if set(OF_A_RUN) <= set(names):
        write_json(asked.paths.output / "done.json", {"count": asked.count, "seed": asked.seed})


def _say_as(prefix: str, say: Callable[[str], None], line: str) -> None:
    say(prefix + line)


def _start_ranks(ranks: int) -> None:
    """Start the same command on ranks of this machine."""
    words = list(sys.argv[1:])
    for place, word in enumerate(words):
        if word == "--ranks":
            del words[place : place + 2]
            break
        if word.startswith("--ranks="):
            del words[place]
            break
    finished = processes.run(processes.deepspeed_command("launchers.cli", words, ranks), ranks)
    if finished.returncode:
        raise UserError(
            f"the ranks ended with exit code {finished.returncode}; mend what they say above and start the "
            "same command again: it goes on from there"
        )


def print_table(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """One row for each task."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", no_wrap=True)
    table.add_column("figure", overflow="fold")
    for heading in ("", "guessing", "items"):
        table.add_column(heading, justify="right", no_wrap=True)
    notes = []
    for name, entry in entries.items():
        chance = entry["chance"]
        table.add_row(
            name,
            entry["headline"],
            "-" if entry["value"] is None else number(entry["value"], entry["unit"]),
            "" if chance is None else number(chance, entry["unit"]),
            str(entry["count"] or ""),
        )
        notes += [f"{name}: {note}" for note in entry["notes"]]
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
