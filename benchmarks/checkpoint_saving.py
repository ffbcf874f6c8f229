"""How long training waits for a checkpoint: files written at once, beside written in the background.

`python -m benchmarks.checkpoint_saving [--megabytes 400] [--steps 12] [--ranks 2]`

Real ranks on the CPU train a stack of matrices under ZeRO-3 with AdamW; fp32 masters and both moments are
what a checkpoint holds. Of each way the run is made twice with saving and once without, one after the other
in the same processes; waiting is what the steps took longer than those without saving, the saving and the
time in which files were written beside a step included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.support.distributed import run_function


def measure(megabytes: int, steps: int) -> dict[str, float]:
    """Train without saving, with saving at once, and in the background; seconds on this rank."""
    import torch
    from torch import nn

    from pretrain.checkpoints.engines import engine_files
    from pretrain.checkpoints.writer import CheckpointWriter
    from pretrain.config import JobConfig
    from pretrain.engine import build_engine
    from pretrain.metrics import Averages
    from pretrain.runtime import start_runtime
    from pretrain.stepping import backward, take_step

    with tempfile.TemporaryDirectory() as place:
        ranks = int(os.environ["WORLD_SIZE"])
        config = JobConfig("toy", place, steps, 64 * ranks, 64, deepspeed="zero3.json", precision="fp32")
        runtime = start_runtime(config)
        layers = max(1, round(megabytes * 1e6 / (12 * 1024**2)))
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
        engine = build_engine(model, config, runtime)

        def step() -> float:
            begin = time.perf_counter()
            backward(engine, engine(torch.randn(64, 1024)).square().mean())
            take_step({"model": engine}, Averages(runtime.device))
            runtime.barrier()
            return time.perf_counter() - begin

        for _ in range(3):
            step()
        found = {"step": statistics.median(step() for _ in range(steps))}
        # All ranks write to one folder: the main one's.
        folder = Path(runtime.from_main(place))
        writer = CheckpointWriter(folder, runtime, "toy", 1)
        for way in ("at once", "in the background", "at once", "in the background"):
            runtime.step += 1
            begin = time.perf_counter()
            files, engines = engine_files({"model": engine}, {}, runtime)
            found["copy"] = time.perf_counter() - begin
            writer.save(files, {"engines": engines}, background=way == "in the background")
            del files
            held = time.perf_counter() - begin
            during = 0
            while writer.pending:
                begin = time.perf_counter()
                took, during = step(), during + 1
                if not runtime.any_rank(writer.busy):
                    writer.finish()
                    took = time.perf_counter() - begin
                held += max(0.0, took - found["step"])
            found[way] = min(held, found.get(way, held))
            found[f"steps {way}"] = during
    return found


def main() -> None:
    """Print seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400, help="of masters and moments, all ranks")
    parser.add_argument("--steps", type=int, default=12, help="without saving, for the median")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    from benchmarks import checkpoint_saving  # by a name that the ranks can import

    what = (checkpoint_saving.measure, options.megabytes, options.steps)
    results = run_function(*what, world_size=options.ranks, process_group=False)
    worst = {name: max(result[name] for result in results) for name in results[0]}
    sys.stdout.write(
        f"{options.ranks} ranks, {options.megabytes} MB of states; a step {worst['step']:.2f} s\n"
        f"training waits: at once {worst['at once']:.2f} s; in the background "
        f"{worst['in the background']:.2f} s, of which {worst['copy']:.2f} s for the copy to host memory "
        f"(the rest: {worst['steps in the background']:.0f} steps beside the writing); "
        f"{worst['at once'] / worst['in the background']:.1f} times less\n"
    )


if __name__ == "__main__":
    main()
