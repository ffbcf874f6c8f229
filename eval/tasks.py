"""What `dualtoken evaluate` can measure: each task's way from files to a result.

Ranks share a task through files in the output folder, without a connection. Its result goes to the rank that
finds everything there, None to those that are done before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dualtoken.perceptual import PerceptualConfig
from eval.comparisons import COMPARISONS
from eval.generation.clip_score import ClipScorer
from eval.generation.drawing import Artist, DrawingSettings
from eval.generation.prompt_tasks import PROMPT_TASKS
from eval.generation.tasks import Scorers, measure_clip_score, measure_frechet, measure_prompts
from eval.inputs import EvaluationPaths, default_device
from eval.metrics.inception import FeatureExtractor, load_inception
from eval.metrics.siglip_features import load_siglip_features
from eval.results import TaskResult
from eval.understanding.answering import By, answer_questions, answering_settings
from eval.understanding.answers import read_answers
from eval.understanding.benchmark import Benchmark, BenchmarkError, Question
from eval.understanding.mmvet import aggregate_grades
from eval.understanding.models import Answerer, load_answerer
from eval.understanding.registry import BENCHMARKS
from eval.understanding.task import draw_questions, result_of
from eval.visual_tokenizer import reconstruction_task, retrieval_task, zero_shot
from eval.visual_tokenizer.batches import Fit, Share
from eval.visual_tokenizer.tasks import TokenizerJob

# Measures of a run's own data. The longest first, so that the last ones fill the gaps.
OF_A_RUN = {
    "scenes": "eval.scenes.measure",
    "likelihood": "eval.likelihood",
    "reconstruction": "eval.visual_tokenizer.reconstruction",
    "retrieval": "eval.visual_tokenizer.retrieval",
    "layers": "eval.visual_tokenizer.layers",
}
# Asked in one go, so that a batch is filled up as answers end; as many are lost by a kill.
BATCHES_TOGETHER = 4


@dataclass
class Evaluation:
    """What was asked of `dualtoken evaluate`; a model is loaded once, when it is first needed."""

    paths: EvaluationPaths
    say: Callable[[str], None]
    data: Path | None = None  # files of the only task, or a folder for each task; None for a run's own
    count: int | None = None
    seed: int = 0
    batch_size: int = 16
    rank: int = 0
    world_size: int = 1
    # Understanding
    answers: Path | None = None  # scored instead of asking a model
    allow_missing: bool = False
    grades: Path | None = None
    by: By = "text"
    max_new_tokens: int | None = None
    template: str | None = None
    precision: str = "fp32"
    # Visual tokenizer
    fit: Fit = "center_crop"
    lpips: PerceptualConfig | None = None
    inception: Path | None = None
    saved: str = "png"
    class_names: str | None = None
    language: str = "en"
    # Generation
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    pictures: Path | None = None  # scored instead of drawing
    reference: Path | None = None
    judged: Path | None = None
    clip: Path | None = None

    @cached_property
    def answerer(self) -> Answerer:
        """The model that is asked."""
        paths, batch = self.paths, self.batch_size
        return load_answerer(
            paths.model, paths.visual_tokenizer, self.template, self.precision, batch, paths.vision_tower
        )

    @cached_property
    def artist(self) -> Artist:
        """The model that draws."""
        return Artist(self.paths.model, self.paths.visual_tokenizer, self.precision)

    @cached_property
    def scorer(self) -> ClipScorer | None:
        """The CLIP that compares pictures with prompts."""
        return None if self.clip is None else ClipScorer(self.clip, default_device())

    @cached_property
    def inception_features(self) -> FeatureExtractor | None:
        """Inception, where its weights are given."""
        return None if self.inception is None else load_inception(self.inception, default_device())

    @cached_property
    def features(self) -> FeatureExtractor:
        """What Fréchet distances of drawn pictures compare: Inception's features, or a SigLIP's."""
        return self.inception_features or load_siglip_features(self.paths.siglip, default_device())

    def files_of(self, task: str) -> Path:
        """The folder of a task's files: the one of its name in `data` if there is one, or `data` itself."""
        data = self.paths.benchmarks if self.data is None else self.data
        return data / task if (data / task).is_dir() else data

    def tokenizer_job(self, task: str) -> TokenizerJob:
        """What a task of the visual tokenizer reads and writes."""
        return TokenizerJob(
            visual_tokenizer=self.paths.visual_tokenizer,
            data=self.files_of(task),
            output=self.paths.output,
            fit=self.fit,
            count=self.count,
            seed=self.seed,
            batch_size=self.batch_size,
            share=Share(self.rank, self.world_size),
        )


def of_a_run(name: str, asked: Evaluation) -> TaskResult | None:
    """Take a measure of a run's own data; its first comparison is the figure of the table."""
    if asked.rank > 0:
        return None
    found = importlib.import_module(OF_A_RUN[name]).run(asked.paths, asked.count, asked.seed)
    settings = {"seed": asked.seed, "count": asked.count}
    if name not in COMPARISONS:
        return TaskResult(name, f"see {name}.json", None, "", 0, files=[f"{name}.json"], settings=settings)
    rows = COMPARISONS[name](found)
    first = rows[0]
    scale, unit = (100.0, "%") if first.unit == "share" else (1.0, first.unit)
    baseline = next((one for one in first.baselines if not one.bound), None)
    return TaskResult(
        task=name,
        headline=first.measure,
        value=scale * first.value,
        unit=unit,
        count=first.trials or found.get("pictures", 0),
        trials=first.trials,
        higher_is_better=first.higher_is_better,
        chance=scale * baseline.value if baseline and baseline.name == "chance" else None,
        tables={
            "Beside something simpler": [
                {
                    "measure": row.measure,
                    "value": row.shown(row.value),
                    "beside": "; ".join(f"{one.name} {row.shown(one.value)}" for one in row.baselines),
                    "verdict": row.verdict(),
                }
                for row in rows
            ]
        },
        files=[f"{name}.json"],
        settings=settings,
    )


def understanding(name: str, asked: Evaluation) -> TaskResult | None:
    """Ask a benchmark's questions, or read somebody's answers, and score them."""
    benchmark, data = BENCHMARKS[name], asked.files_of(name)
    if asked.grades is not None:
        scores = aggregate_grades(asked.grades, benchmark.read(data, False))
        return TaskResult(
            name, benchmark.headline, scores.value, benchmark.unit, len(scores.per_question),
            figures=scores.figures, tables=scores.tables, settings={"grades": str(asked.grades)},
        )  # fmt: skip
    if asked.answers is not None:
        every, notes = _with_pictures_if_there(benchmark, data)
        answers = read_answers(asked.answers, benchmark, every, asked.allow_missing)
        questions = draw_questions(every, asked.count, asked.seed)
        settings = {"answers": str(asked.answers), "data": str(data)}
        return result_of(benchmark, questions, answers, asked.paths.output, settings, notes)
    questions = draw_questions(benchmark.read(data, True), asked.count, asked.seed)
    together = BATCHES_TOGETHER * asked.batch_size if asked.by == "text" else asked.batch_size
    path = answer_questions(
        benchmark,
        questions,
        asked.answerer,
        asked.paths.output / name,
        rank=asked.rank,
        world_size=asked.world_size,
        batch_size=together,
        by=asked.by,
        max_new_tokens=asked.max_new_tokens,
        progress=lambda line: asked.say(f"{name}: {line}"),
    )
    if path is None:
        return None
    answers = read_answers(path, benchmark, questions)
    settings = {**answering_settings(path.parent), "data": str(data)}
    return result_of(benchmark, questions, answers, asked.paths.output, settings)


def _with_pictures_if_there(benchmark: Benchmark, data: Path) -> tuple[list[Question], list[str]]:
    """The questions that answers are scored of, and a note where cases cannot show their pictures."""
    try:
        return benchmark.read(data, True), []
    except BenchmarkError as error:
        return benchmark.read(data, False), [f"cases are shown without pictures: {error}"]


def reconstruction(name: str, asked: Evaluation) -> TaskResult | None:
    """Reconstruction of a run's pictures, or of the user's."""
    if asked.data is None:
        return of_a_run(name, asked)
    return reconstruction_task.measure(
        asked.tokenizer_job(name), asked.lpips, asked.inception_features, asked.saved
    )


def retrieval(name: str, asked: Evaluation) -> TaskResult | None:
    """Retrieval among a run's pictures, or the user's."""
    if asked.data is None:
        return of_a_run(name, asked)
    return retrieval_task.measure(asked.tokenizer_job(name), asked.paths.siglip, asked.language)


def classification(name: str, asked: Evaluation) -> TaskResult | None:
    """Zero-shot classification."""
    return zero_shot.measure(asked.tokenizer_job(name), asked.paths.siglip, asked.class_names)


def drawing(name: str, asked: Evaluation) -> TaskResult | None:
    """Draw prompts, and score the pictures by what there is to score by."""
    compares = PROMPT_TASKS[name].by == "references" or asked.reference is not None
    scorers = Scorers(asked.judged, asked.reference, asked.features if compares else None, asked.scorer)
    return measure_prompts(
        name,
        asked.files_of(name),
        asked.paths.output,
        scorers,
        artist=None if asked.pictures else asked.artist,
        settings=asked.drawing,
        pictures=asked.pictures,
        count=asked.count,
        seed=asked.seed,
        rank=asked.rank,
        world_size=asked.world_size,
        batch_size=asked.batch_size,
        say=lambda line: asked.say(f"{name}: {line}"),
    )


def frechet(name: str, asked: Evaluation) -> TaskResult | None:
    """Distance between two folders of pictures.

    Raises:
        ValueError: one of them is not named.
    """
    if asked.rank > 0:
        return None
    if asked.pictures is None or asked.reference is None:
        raise ValueError("frechet compares two folders: name them by --pictures and --reference")
    return measure_frechet(asked.pictures, asked.reference, asked.features, asked.batch_size, asked.say)


def clip_score(name: str, asked: Evaluation) -> TaskResult | None:
    """Agreement of pictures with the prompts that a `prompts.jsonl` beside them has.

    Raises:
        ValueError: pictures or the CLIP are not named.
    """
    if asked.rank > 0:
        return None
    if asked.pictures is None or asked.scorer is None:
        raise ValueError(
            "clip_score takes --pictures, a folder with prompts.jsonl, and --clip, the folder of a CLIP"
        )
    return measure_clip_score(asked.pictures, asked.paths.output, asked.scorer, asked.batch_size, asked.say)


TASKS: dict[str, Callable[[str, Evaluation], TaskResult | None]] = {
    **dict.fromkeys(OF_A_RUN, of_a_run),
    "reconstruction": reconstruction,
    "retrieval": retrieval,
    "zero_shot": classification,
    **dict.fromkeys(BENCHMARKS, understanding),
    **dict.fromkeys(PROMPT_TASKS, drawing),
    "frechet": frechet,
    "clip_score": clip_score,
}
