"""`dualtoken evaluate`: tasks side by side, a process for each core at most, or in turn on several ranks."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from eval.model_files import fingerprint_of_files
from eval.results import TaskResult, record
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
        asked.say(f"{result.task}: {shown(result.as_json())} ({seconds:.0f} s)")
    # Results are recorded one at a time, so one rank alone sees the last one come.
    there = all(content["tasks"].get(name, {}).get("recorded", 0) >= started for name in names)
    return content if there else None


def shown(entry: Mapping[str, Any]) -> str:
    """The figure of the table with its name and unit."""
    if entry["value"] is None:
        return entry["headline"]
    digits = 2 if abs(entry["value"]) >= 1 else 3
    return f"{entry['headline']} {entry['value']:.{digits}f} {entry['unit']}".rstrip()


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
        running = [pool.submit(_take, unit, asked) for unit in units]
        try:
            for future in as_completed(running):
                yield from future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _take(unit: Sequence[str], asked: Evaluation) -> list[tuple[TaskResult, float]]:
    found = []
    for name in unit:
        started = time.monotonic()
        result = TASKS[name](name, asked)
        if result is not None:  # else other ranks have some of it to do
            found.append((result, time.monotonic() - started))
    return found
