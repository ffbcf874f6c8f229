"""Asking a model the questions of a benchmark, on any number of ranks, so that a killed run goes on.

In the output folder lie `answers/settings.json`, what decides the answers; `answers/part-*.jsonl`, a rank's
answers as they come; and, once all are there, `answers.jsonl` in the order of the questions. Ranks need no
connection, only the folder: each asks what is missing of its own slice, and who finds all answers there at
its end writes the whole.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from data_pipeline.shards.code_shards import write_atomically
from eval.agreement import SETTINGS, agree
from eval.progress import counted
from eval.understanding.answer_parts import Answer, PartWriter, identity, read_parts
from eval.understanding.answers import answer_row
from eval.understanding.benchmark import Benchmark, BenchmarkError, Question
from eval.understanding.models import Answerer

By = Literal["text", "likelihood"]
ANSWERS, PARTS = "answers.jsonl", "answers"
NOT_DECIDING = ("model", "versions")  # the name, and what only rounds differently


def answer_questions(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answerer: Answerer,
    output: Path,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 16,
    by: By = "text",
    max_new_tokens: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Path | None:
    """Ask what is missing of this rank's slice of the questions; the whole is written by who is last.

    A slice is ceil(N / world_size) questions in their order. Neither ranks nor batches decide an answer.

    Args:
        benchmark: whose questions they are.
        questions: all of them, whatever the rank; optional ones are not asked. More or other ones later keep
            the answers to these.
        answerer: the model.
        output: folder, the same for all ranks.
        rank: of this process.
        world_size: number of processes.
        batch_size: questions asked at a time.
        by: `text` takes what the model writes; `likelihood` the likeliest of the question's options.
        max_new_tokens: of an answer; the benchmark's by default.
        progress: takes a line now and then; on a terminal a bar is drawn as well.

    Returns:
        The file of all answers; None while other ranks have some to give.

    Raises:
        BenchmarkError: the folder holds answers by other settings, another process writes this rank's part,
            a question has no options to compare, or a picture cannot be read.
    """
    limit = benchmark.max_new_tokens if max_new_tokens is None else max_new_tokens
    if not 0 <= rank < world_size or batch_size < 1 or limit < 1:
        raise BenchmarkError(
            f"rank {rank} of {world_size}, batch size {batch_size}, {limit} new tokens; expected a rank from "
            "0, and 1 or more of the others"
        )
    questions = _asked(questions)
    _require_options(benchmark, questions, by)
    folder = output / PARTS
    agree(folder, settings_of(benchmark, answerer, by, limit), "answers", NOT_DECIDING)
    length = -(-len(questions) // world_size)
    own = questions[rank * length : (rank + 1) * length]
    with PartWriter(folder, rank) as part:
        missing = _missing(own, folder)
        if len(missing) < len(own):
            progress(f"{len(own) - len(missing)} of {len(own)} answers are there")
        bar = None if world_size == 1 else False  # one bar a rank would be drawn over another
        with counted(len(missing), "answers", progress, bar) as advance:
            # In their order: questions of one picture are neighbours, and most of a prompt is the picture,
            # so sorting by length would save little padding.
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                for question, answer in zip(batch, _ask(answerer, batch, by, limit), strict=True):
                    part.write(question, answer)
                part.flush()
                advance(len(batch))
    return _collect_if_complete(questions, output)


def collect_answers(questions: Sequence[Question], output: Path) -> Path:
    """Write the answers of all ranks into one file, in the order of the questions, and return it.

    Raises:
        BenchmarkError: some are missing.
    """
    questions = _asked(questions)
    path = _collect_if_complete(questions, output)
    if path is None:
        missing = [str(question.question_id) for question in _missing(questions, output / PARTS)]
        raise BenchmarkError(
            f"{output} lacks {len(missing)} of {len(questions)} answers (question {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); start the same command again to ask them"
        )
    return path


def settings_of(benchmark: Benchmark, answerer: Answerer, by: By, max_new_tokens: int) -> dict[str, Any]:
    """What decides the answers to a benchmark's questions, as `settings.json` keeps it."""
    return {
        "benchmark": benchmark.name,
        "model": answerer.name,
        "fingerprint": answerer.fingerprint,
        "by": by,
        "max_new_tokens": max_new_tokens if by == "text" else None,
        **answerer.settings,
    }


def answering_settings(output: Path) -> dict[str, Any]:
    """What decided the answers in a folder."""
    return json.loads((output / PARTS / SETTINGS).read_text(encoding="utf-8"))


def _asked(questions: Sequence[Question]) -> list[Question]:
    return [question for question in questions if not question.optional]


def _require_options(benchmark: Benchmark, questions: Sequence[Question], by: By) -> None:
    without = [question for question in questions if len(question.options) < 2]
    if by == "likelihood" and without:
        raise BenchmarkError(
            f"{benchmark.name}: question {without[0].question_id} has {len(without[0].options)} options, so "
            "there are no likelihoods to compare; ask by text"
        )


def _ask(answerer: Answerer, batch: Sequence[Question], by: By, max_new_tokens: int) -> list[Answer]:
    if by == "text":
        return [Answer(text) for text in answerer.answer(batch, max_new_tokens)]
    answers = []
    for question, found in zip(batch, answerer.choose(batch), strict=True):
        best = max(range(len(found)), key=found.__getitem__)
        # Rounded: the last digits depend on the batch.
        likelihoods = {option: round(value, 4) for option, value in zip(question.options, found)}
        answers.append(Answer(question.options[best], {"log_likelihoods": likelihoods}))
    return answers


def _missing(questions: Sequence[Question], folder: Path) -> list[Question]:
    known = read_parts(folder)
    return [question for question in questions if identity(question) not in known]


def _collect_if_complete(questions: Sequence[Question], output: Path) -> Path | None:
    known = read_parts(output / PARTS)
    answers = [known[name] for name in map(identity, questions) if name in known]
    if len(answers) < len(questions):
        return None
    model = answering_settings(output)["model"]
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        row = {**answer_row(question, answer.text, model), "metadata": dict(answer.metadata)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = output / ANSWERS
    write_atomically(path, "".join(lines))  # two ranks that end together write the same
    return path
