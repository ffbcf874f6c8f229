"""`dualtoken evaluate`: the measures side by side, a process for each core at most."""

import importlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from eval.inputs import EvaluationPaths
from eval.results import write_json
from launchers.processes import available_cores

# The longest first, so that the last ones fill the gaps.
MEASURES = {
    "generation": "eval.generation.samples",
    "likelihood": "eval.likelihood",
    "reconstruction": "eval.visual_tokenizer.reconstruction",
    "retrieval": "eval.visual_tokenizer.retrieval",
    "layers": "eval.visual_tokenizer.layers",
}
MOST_WORKERS = 2  # each holds the models once


def measure(name: str, paths: EvaluationPaths, count: int | None, seed: int) -> float:
    """Take one measure; returns the seconds it took."""
    started = time.monotonic()
    importlib.import_module(MEASURES[name]).run(paths, count, seed)
    return time.monotonic() - started


def evaluate(
    names: Sequence[str], paths: EvaluationPaths, count: int | None, seed: int, say: Callable[[str], None]
) -> None:
    """Take measures and write their results; `done.json` when it was all of them.

    Args:
        names: of the measures, empty for all.
        paths: what to read and where to write.
        count: samples a measure takes at most.
        seed: of the draws.
        say: called with a line when a measure is done.

    Raises:
        ValueError, FileNotFoundError: whatever a measure says is wrong with its inputs.
    """
    import torch

    wanted = [name for name in MEASURES if name in names or not names]
    workers = 1 if torch.cuda.is_available() else min(MOST_WORKERS, available_cores(), len(wanted))
    seconds: dict[str, float] = {}

    def finished(name: str, took: float) -> None:
        seconds[name] = took
        say(f"{name}: {paths.output / f'{name}.json'} ({took:.0f} s)")

    say(f"measuring {', '.join(wanted)}")
    if workers == 1:
        for name in wanted:
            finished(name, measure(name, paths, count, seed))
    else:
        # Read by the workers' torch when they start: small models gain more from a second process.
        os.environ["OMP_NUM_THREADS"] = str(available_cores() // workers)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(measure, name, paths, count, seed): name for name in wanted}
            try:
                for future in as_completed(running):
                    finished(running[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    if set(seconds) == set(MEASURES):
        write_json(paths.output / "done.json", {"seconds": seconds, "count": count, "seed": seed})
