"""Writing all local benchmarks, each into a folder of its task's name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from data_pipeline.sources.local_benchmarks import choices, prompts, short_answers
from data_pipeline.sources.local_benchmarks.scenes import read_drawings

FEWEST = 8  # held-out concepts: fewer give no wrong answers to choose from

WRITERS = {
    "vqav2": short_answers.write_vqav2,
    "textvqa": short_answers.write_textvqa,
    "pope": short_answers.write_pope,
    "mme": short_answers.write_mme,
    "seed": choices.write_seed,
    "mmbench": choices.write_mmbench,
    "mmvet": choices.write_mmvet,
    "ai2d": choices.write_ai2d,
    "geneval": prompts.write_geneval,
    "genai_bench": prompts.write_genai_bench,
    "mjhq": prompts.write_mjhq,
    "drawing": prompts.write_drawing,
    "retrieval": prompts.write_retrieval,
    "zero_shot": prompts.write_zero_shot,
}


def write_local_benchmarks(shards: Path, output: Path, image_size: int, seed: int) -> dict[str, int]:
    """Write every benchmark that the held-out drawings suffice for; equal arguments give equal bytes.

    Answers are true by the drawings' names, by their pixels, or because the picture was composed so.

    Args:
        shards: folder of the sample data's held-out image-text shards.
        output: folder that gets one folder for each benchmark.
        image_size: side of a drawing in pixels; composed pictures are twice as wide.
        seed: of what is asked.

    Returns:
        questions, prompts or pictures by benchmark; nothing where there are fewer than 8 held-out concepts.

    Raises:
        ImportError: a package of the extra `sample` is missing.
        ValueError: a drawing has no English name.
    """
    drawings = read_drawings(shards, image_size)
    if len(drawings.things) < FEWEST:
        return {}
    written = {}
    for name, write in WRITERS.items():
        # A draw of its own, so that a change of one benchmark leaves the others as they are.
        count = write(drawings, output / name, random.Random(f"{seed}:{name}"))
        if count:
            written[name] = count
        else:
            shutil.rmtree(output / name, ignore_errors=True)
    return written
