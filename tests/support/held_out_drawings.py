"""Small sample data without rendering all 1,567 drawings: some as image-text shards, scenes, benchmarks."""

import json
import random
from functools import cache
from pathlib import Path

from webdataset import TarWriter

from data_pipeline.sources.local_benchmarks.held_out import HeldOutScenes
from data_pipeline.sources.local_benchmarks.write import write_local_benchmarks
from data_pipeline.sources.openmoji import drawings_folder, find_pictures, render
from data_pipeline.sources.scenes.parts import hold_out
from data_pipeline.sources.scenes.write import training_scenes


@cache
def pictures():
    return find_pictures(("en", "de", "es"))[0]


def write_drawings(folder: Path, count: int, size: int) -> Path:
    """Every so manieth drawing, and all cooks; yields shards as `dualtoken sample-data` writes them."""
    chosen = pictures()[:: len(pictures()) // count][:count]
    chosen += [one for one in pictures() if one.concept == "cook" and one not in chosen]
    folder.mkdir(parents=True)
    with TarWriter(str(folder / "shard-000000.tar"), encoder=False, mtime=0) as writer:
        for one in chosen[:count] if count < 8 else chosen:
            record = {"captions": one.captions, "concept": one.concept}
            png = render(drawings_folder() / f"{one.key}.svg", size)
            sample = {"__key__": one.key, "png": png}
            writer.write({**sample, "json": json.dumps(record, ensure_ascii=False).encode()})
    return folder


@cache
def scenes() -> HeldOutScenes:
    """Held-out combinations of scenes, and 600 scenes to train on."""
    combinations = hold_out(0.1, 0)
    trained = training_scenes(600, combinations, random.Random(0))
    return HeldOutScenes(combinations, trained, ("en", "de", "es"))


def write_benchmarks(folder: Path, output: Path, size: int = 32) -> dict[str, int]:
    """Every local benchmark, about `scenes()` and about drawings written to a folder; counts by name."""
    return write_local_benchmarks(write_drawings(folder, 60, size), scenes(), output, size, seed=0)
