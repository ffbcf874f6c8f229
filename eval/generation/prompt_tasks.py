"""The tasks that begin with a file of prompts: which file, where its pictures lie, what scores them."""

from dataclasses import dataclass
from pathlib import Path

from eval.benchmark_files import find_file
from eval.generation.prompts import GENAI_BENCH, GENEVAL, MJHQ, PLAIN, Layout, PromptSet, read_prompts

SKILLS, MJHQ_PICTURES = "genai_skills.json", "mjhq30k_imgs"


@dataclass(frozen=True)
class PromptTask:
    """A task that begins with a file of prompts."""

    layout: Layout
    files: tuple[str, ...]  # names of the file of prompts
    headline: str
    by: str  # which of the scorers gives it: judge, references, clip
    advice: str  # where that one is not given


PROMPT_TASKS = {
    "geneval": PromptTask(
        GENEVAL,
        ("evaluation_metadata.jsonl",),
        "overall",
        "judge",
        "not judged: run GenEval's evaluation/evaluate_images.py on the pictures and give its results",
    ),
    "genai_bench": PromptTask(
        GENAI_BENCH,
        ("genai_image.json",),
        "VQAScore, advanced",
        "judge",
        "not judged: run VQAScore (t2v_metrics) on the pictures and give its scores",
    ),
    "mjhq": PromptTask(
        MJHQ,
        ("meta_data.json",),
        "FID",
        "references",
        f"not compared: give {MJHQ_PICTURES}/, and Inception's weights or a SigLIP",
    ),
    "drawing": PromptTask(
        PLAIN,
        ("prompts.txt", "*.txt", "*.jsonl"),
        "CLIP score",
        "clip",
        "not scored: give a CLIP or a SigLIP",
    ),
}


def read_task(task: str, data: Path) -> PromptSet:
    """The prompts of a task, from its file or the folder it lies in.

    Raises:
        BenchmarkError: there is none, or it is another benchmark's.
    """
    wanted = PROMPT_TASKS[task]
    path = data if data.is_file() else find_file(data, *wanted.files, what=wanted.layout.needs)
    return read_prompts(path, wanted.layout)
