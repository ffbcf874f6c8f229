"""A benchmark as a task of `dualtoken evaluate`: answers in, scores, submission and cases out."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.cases import extremes, make_case
from eval.results import Case, TaskResult
from eval.understanding.benchmark import Benchmark, Question, Scores


def draw_questions(questions: Sequence[Question], count: int | None, seed: int) -> list[Question]:
    """`count` questions drawn at random, a few more where some are scored together; all by default.

    Optional ones are not drawn: nobody is asked them.
    """
    if count is None:
        return list(questions)
    questions = [question for question in questions if not question.optional]
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group or question.key, []).append(question)
    order = list(groups)
    random.Random(seed).shuffle(order)
    chosen: set[str] = set()
    for group in order:
        if len(chosen) >= count:
            break
        chosen |= {question.key for question in groups[group]}
    return [question for question in questions if question.key in chosen]


def result_of(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Mapping[str, str],
    output: Path,
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> TaskResult:
    """Score answers by the benchmark's rule; write its submission and the pictures of the cases.

    Args:
        benchmark: whose questions they are.
        questions: those measured.
        answers: text by question key.
        output: folder of the whole evaluation; files go to a folder of the benchmark's name in it.
        settings: what made the answers.
        notes: what a reader has to know besides.
    """
    scores = benchmark.score(questions, answers)
    silent = [question for question in questions if question.optional and question.key not in answers]
    folder = output / benchmark.name
    files = [] if benchmark.submit is None else benchmark.submit(questions, answers, folder)
    scored = [question for question in questions if question.key in scores.per_question]
    worst, best = extremes([scores.per_question[question.key] for question in scored])
    return TaskResult(
        task=benchmark.name,
        headline=benchmark.headline,
        value=scores.value,
        unit=benchmark.unit,
        count=len(questions) - len(silent),
        chance=benchmark.chance(questions) if benchmark.chance else None,
        trials=len({question.group or question.key for question in scored}) if benchmark.share else None,
        figures=scores.figures,
        tables=scores.tables,
        worst=_cases([scored[place] for place in worst], answers, scores, output, folder / "worst"),
        best=_cases([scored[place] for place in best], answers, scores, output, folder / "best"),
        files=[str(path.relative_to(output)) for path in files],
        notes=[*notes, *scores.notes, *_without_words(questions, answers)],
        settings=settings,
    )


def _in_words(truth: Any) -> str:
    """A truth for a reader; of ten people's answers each once, the most frequent first."""
    answers = truth["answers"] if isinstance(truth, Mapping) else truth
    if isinstance(answers, Sequence) and not isinstance(answers, str):
        counted = Counter(map(str, answers)).most_common()
        return ", ".join(f"{answer} ({count})" if len(counted) > 1 else answer for answer, count in counted)
    return str(answers)


def _cases(
    questions: Sequence[Question], answers: Mapping[str, str], scores: Scores, output: Path, folder: Path
) -> list[Case]:
    cases = []
    for index, question in enumerate(questions):
        lines = [
            f"question: {question.prompt}",
            f"answer: {answers.get(question.key, '(none)')}",
            f"truth: {_in_words(question.truth)}",
        ]
        score = scores.per_question[question.key]
        if question.image is None:  # answers alone are scored
            cases.append(Case(None, lines, score))
            continue
        cases.append(make_case(question.image, lines, score, folder / f"{index:02d}.png", output))
    return cases


def _without_words(questions: Sequence[Question], answers: Mapping[str, str]) -> list[str]:
    """Notes on answers that are missing or empty: a table of figures does not show them."""
    asked = [answers.get(question.key) for question in questions if not question.optional]
    notes = []
    if missing := asked.count(None):
        notes.append(f"{missing} of {len(asked)} questions have no answer and count as wrong")
    if empty := sum(answer is not None and not answer.strip() for answer in asked):
        notes.append(f"{empty} of {len(asked)} answers are empty; they are scored as they stand")
    return notes
