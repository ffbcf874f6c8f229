"""The generation tasks of `dualtoken evaluate`: draw where a model is given, score by what is given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.agreement import SETTINGS
from eval.benchmark_files import BenchmarkError, find_file
from eval.generation.clip_score import ClipScorer, score_by_clip
from eval.generation.distances import by_category, score_by_distance
from eval.generation.drawing import (
    PICTURES,
    Artist,
    Drawing,
    DrawingSettings,
    draw_prompts,
    drawings_of,
    listed_drawings,
)
from eval.generation.findings import Finding, cases
from eval.generation.judges import judge_genai_bench, judge_geneval
from eval.generation.prompt_tasks import MJHQ_PICTURES, PROMPT_TASKS, SKILLS, read_task
from eval.generation.prompts import GENAI_BENCH, GENEVAL, MJHQ, PromptSet
from eval.metrics.inception import FeatureExtractor
from eval.results import TaskResult, read_json


@dataclass(frozen=True)
class Scorers:
    """What pictures are scored by; every one is optional."""

    judged: Path | None = None  # a judge's file: GenEval's results, GenAI-Bench's scores
    references: Path | None = None  # folder of pictures to compare with; MJHQ-30K's by default
    extractor: FeatureExtractor | None = None  # for the comparison
    clip: ClipScorer | None = None


def measure_prompts(
    task: str,
    data: Path,
    output: Path,
    scorers: Scorers,
    artist: Artist | None = None,
    settings: DrawingSettings | None = None,
    pictures: Path | None = None,
    count: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> TaskResult | None:
    """Draw a benchmark's prompts, and score the pictures by what is given.

    Args:
        task: of `PROMPT_TASKS`.
        data: the file of prompts, or the folder it lies in.
        output: folder of the whole evaluation; files go to a folder of the task's name in it.
        scorers: what there is to score by.
        artist: the model that draws; without one the pictures have to be there.
        settings: of the sampling.
        pictures: a folder in the benchmark's layout to score in place of drawing.
        count: prompts drawn at random, all by default.
        seed: of that draw; the pictures' own is in `settings`.
        rank: of this process.
        world_size: number of processes.
        batch_size: pictures at a time.
        say: takes a line now and then.

    Returns:
        the result; None while other ranks have pictures to draw.

    Raises:
        BenchmarkError: files or pictures are missing or do not fit the task.
    """
    wanted, folder = PROMPT_TASKS[task], output / task
    settings = (settings or DrawingSettings()).of(wanted.layout)
    everything = read_task(task, data)
    prompts = everything.draw(count, seed)
    if artist is not None and pictures is None:
        drawn = draw_prompts(prompts, artist, folder, settings, rank, world_size, batch_size, say)
        if drawn is None:
            return None
        drawings = drawn
    else:
        drawings = _there(drawings_of(prompts, pictures or folder / PICTURES, settings))
    findings = _findings(everything, drawings, scorers, batch_size, say)
    made_by = {"pictures": str(pictures)} if pictures else read_json(folder / SETTINGS) or {}
    result = _result(
        task,
        len(drawings),
        [findings[name] for name in sorted(findings, key=lambda name: name != wanted.by)],
        headline=wanted.headline,
        notes=[*([] if wanted.by in findings else [wanted.advice]), *_of_others(findings, drawings)],
        settings={**made_by, "prompt_file": str(everything.source)},
    )
    by_picture = findings.get("judge") or findings.get("clip")
    shown = cases(by_picture, drawings, output, folder) if by_picture else {}
    files = [] if pictures else [str((folder / PICTURES).relative_to(output))]
    return replace(result, files=files, **shown)


def _of_others(findings: Mapping[str, Finding], drawings: Sequence[Drawing]) -> list[str]:
    """A note where a judge's file is of other pictures, of fewer or of more: its figures are of those."""
    if "judge" not in findings:
        return []
    judged, here = set(findings["judge"].scores), {one.place for one in drawings}
    if judged == here:
        return []
    return [
        f"the judge's file has {len(judged)} pictures, {len(judged & here)} of the {len(here)} that are "
        "here: the figures are of those in the file"
    ]


def measure_frechet(
    pictures: Path,
    references: Path,
    extractor: FeatureExtractor,
    batch_size: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> TaskResult:
    """Distance between two folders of pictures; by category where both have the same folders in them.

    Raises:
        BenchmarkError: a folder or its pictures cannot be read.
    """
    first, second = by_category(pictures), by_category(references)
    found = score_by_distance(first, second, extractor, batch_size, say)
    settings = {"pictures": str(pictures), "references": str(references)}
    return _result("frechet", sum(map(len, first.values())), [found], settings=settings)


def measure_clip_score(
    pictures: Path,
    output: Path,
    clip: ClipScorer,
    batch_size: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> TaskResult:
    """CLIP score of the pictures that a folder's `prompts.jsonl` names, such as a drawing task leaves it.

    Raises:
        BenchmarkError: the list or a picture is missing.
    """
    drawings = listed_drawings(pictures)
    found = score_by_clip(clip, drawings, batch_size, say)
    result = _result("clip_score", len(drawings), [found], settings={"pictures": str(pictures)})
    return replace(result, **cases(found, drawings, output, output / "clip_score"))


def _there(drawings: list[Drawing]) -> list[Drawing]:
    """The same, all of them drawn before."""
    missing = [one.path for one in drawings if not one.path.is_file()]
    if missing:
        raise BenchmarkError(
            f"{len(missing)} of {len(drawings)} pictures are missing, such as {missing[0]}; give a model to "
            "draw them, or the folder where they lie"
        )
    return drawings


def _findings(
    prompts: PromptSet,
    drawings: Sequence[Drawing],
    scorers: Scorers,
    batch_size: int,
    say: Callable[[str], None],
) -> dict[str, Finding]:
    """What can be found by the scorers that are given.

    Raises:
        BenchmarkError: a judge's file is given for a task that has no judge, or one that does not fit.
    """
    found = {}
    folder = prompts.source.parent
    if scorers.judged is not None:
        if prompts.layout is GENEVAL:
            found["judge"] = judge_geneval(scorers.judged)
        elif prompts.layout is GENAI_BENCH:
            skills = find_file(folder, SKILLS, what="prompt numbers by skill, of GenAI-Bench's release")
            found["judge"] = judge_genai_bench(scorers.judged, prompts.prompts, skills)
        else:
            raise BenchmarkError(f"{scorers.judged}: only geneval and genai_bench have judges' files")
    references = scorers.references
    if references is None and prompts.layout is MJHQ and (folder / MJHQ_PICTURES).is_dir():
        references = folder / MJHQ_PICTURES
    if references is not None and scorers.extractor is not None:
        drawn: dict[str, list[Path]] = {}
        for one in drawings:
            drawn.setdefault(one.prompt.category or "", []).append(one.path)
        found["references"] = score_by_distance(
            drawn, by_category(references), scorers.extractor, batch_size, say
        )
    if scorers.clip is not None:
        found["clip"] = score_by_clip(scorers.clip, drawings, batch_size, say)
    return found


def _result(
    task: str,
    count: int,
    findings: Sequence[Finding],
    headline: str = "",
    notes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> TaskResult:
    """A result of findings, the first of which gives the headline; `headline` where there is none."""
    main = findings[0] if findings else Finding(headline, None, {})
    return TaskResult(
        task=task,
        headline=main.headline,
        value=main.value,
        unit=main.unit,
        count=count,
        higher_is_better=main.higher_is_better,
        figures={name: value for one in findings for name, value in one.figures.items()},
        tables={title: rows for one in findings for title, rows in one.tables.items()},
        notes=[*notes, *(note for one in findings for note in one.notes)],
        settings={**(settings or {}), **{k: v for one in findings for k, v in one.settings.items()}},
    )
