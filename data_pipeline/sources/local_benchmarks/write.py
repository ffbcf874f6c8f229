"""Writing all local benchmarks, each into a folder of its task's name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from data_pipeline.sources.local_benchmarks import choices, prompts, short_answers
from data_pipeline.sources.local_benchmarks.canvas import read_drawings
from data_pipeline.sources.local_benchmarks.held_out import HeldOutScenes
from data_pipeline.sources.local_benchmarks.material import Material

FEWEST = 8  # held-out concepts: fewer make no task of what is about drawings
ABOUT_DRAWINGS = ("ai2d", "zero_shot")

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


def write_local_benchmarks(
    shards: Path, scenes: HeldOutScenes | None, output: Path, image_size: int, seed: int
) -> dict[str, int]:
    """Write every benchmark that there is something to ask about; equal arguments give equal bytes.

    Questions and prompts are about held-out scenes, in the words of the conversations to train on. Lettering,
    labels and classes, which scenes do not have, are shown by drawings. Answers are true because the picture
    was composed so.

    Args:
        shards: folder of the sample data's held-out drawings.
        scenes: what is held out of scenes, and the scenes to train on; None leaves out what needs scenes.
        output: folder that gets one folder for each benchmark.
        image_size: side of a scene or a drawing in pixels; drawings put together are twice as wide.
        seed: of what is asked.

    Returns:
        questions, prompts or pictures by benchmark; none of AI2D and of classes of drawings where there are
        fewer than 8 held-out concepts.

    Raises:
        ImportError: a package of the extra `sample` is missing.
        ValueError: a drawing has no English name, or scenes cannot be drawn in this size.
    """
    material = Material(read_drawings(shards, image_size), scenes, image_size)
    written = {}
    for name, write in WRITERS.items():
        if name in ABOUT_DRAWINGS and len(material.drawings.things) < FEWEST:
            continue
        # A draw of its own, so that a change of one benchmark leaves the others as they are.
        count = write(material, output / name, random.Random(f"{seed}:{name}"))
        if count:
            written[name] = count
        else:
            shutil.rmtree(output / name, ignore_errors=True)
    return written
