"""MM-Vet: open questions that an outside judge grades (arXiv 2308.02490).

The answers are exported for the judge; the grades that it gives, `{id: {model, content, score}}` with a list
entry for each run, are averaged here as by its script: by capability, by combination of capabilities, in all.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards.code_shards import write_atomically
from eval.benchmark_files import field_of, find_file, find_image, read_json_file, read_json_lines
from eval.understanding.benchmark import Benchmark, BenchmarkError, Question, Scores

QUESTIONS, LLAVA = "mm-vet.json", "llava-mm-vet.jsonl"


def read(folder: Path, pictures: bool = True) -> list[Question]:
    """The questions of `mm-vet.json`, or of LLaVA's file where that one alone is there."""
    official = sorted(folder.rglob(QUESTIONS)) if folder.is_dir() else []
    rows: list[tuple[str, str, str, str, tuple[str, ...]]] = []  # id, image, question, where, capabilities
    if official:
        path = official[0]
        content = read_json_file(path)
        if not isinstance(content, dict):
            raise BenchmarkError(f"{path} holds a {type(content).__name__}; expected {NEEDS}")
        for name, row in content.items():
            where = f"{path}, entry {name!r}"
            if not isinstance(row, dict):
                raise BenchmarkError(f"{where}: got {row!r:.40}; expected an object")
            capabilities = tuple(field_of(row, "capability", list, where))
            image = field_of(row, "imagename", str, where)
            rows.append((name, image, field_of(row, "question", str, where), where, capabilities))
    else:
        path = find_file(folder, LLAVA, what=NEEDS)
        for number, row in read_json_lines(path):
            where = f"{path}, line {number}"
            name = f"v1_{field_of(row, 'question_id', (int, str), where)}"
            rows.append(
                (name, field_of(row, "image", str, where), field_of(row, "text", str, where), where, ())
            )
    folders = [path.parent / "images", folder / "images", folder / "mm-vet" / "images", folder]
    questions: dict[str, Question] = {}
    for name, image, text, where, capabilities in rows:
        number = name.removeprefix("v1_")
        if name in questions:
            raise BenchmarkError(f"{where}: a question {name} was there before; keep one of them")
        questions[name] = Question(
            key=name,
            question_id=int(number) if number.isdigit() else name,
            prompt=text,
            image=find_image(folders, image, where) if pictures else None,
            category="_".join(sorted(capabilities)) or "conv",
            truth=capabilities,
        )
    if not questions:
        raise BenchmarkError(f"{path} has no questions; expected {NEEDS}")
    return list(questions.values())


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> Scores:
    """Nothing yet: a judge has to grade the answers."""
    note = (
        "not graded: give the exported answers to MM-Vet's evaluator (a judge by GPT-4), then its grades "
        "by --grades FILE"
    )
    return Scores(None, {"total": None}, notes=[note])


def submit(questions: Sequence[Question], answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the answers as the judge reads them: `{"v1_0": answer, ...}`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "answers_for_judge.json"
    rows = {question.key: answers.get(question.key, "") for question in questions}
    write_atomically(path, json.dumps(rows, indent=4, ensure_ascii=False) + "\n")
    return [path]


def aggregate_grades(grades: Path, questions: Sequence[Question]) -> Scores:
    """Average a judge's grades, in percent with one decimal; std is over runs, of the whole population.

    Args:
        grades: the file of MM-Vet's evaluator, grades in [0, 1].
        questions: all of the benchmark, read from `mm-vet.json`, which has the capabilities.

    Raises:
        BenchmarkError: a grade is missing, no number from 0 to 1, or of an unknown question; or questions
            differ in their number of runs.
    """
    runs = _runs(grades, questions)
    totals = _percents(list(runs.values()))
    total = _rounded(totals.mean())
    figures: dict[str, float | None] = {
        "total": total,
        "std over runs": _rounded(totals.std()),
        **{f"run {number}": _rounded(value) for number, value in enumerate(totals, 1)},
    }
    return Scores(
        value=total,
        figures=figures,
        tables={
            "By capability": _table(questions, runs, "capability", lambda q: q.truth),
            "By combination of capabilities": _table(
                questions, runs, "capabilities", lambda q: ("_".join(sorted(q.truth)),)
            ),
        },
        per_question={key: statistics.fmean(scores) for key, scores in runs.items()},
    )


def _runs(path: Path, questions: Sequence[Question]) -> dict[str, list[float]]:
    content = read_json_file(path)
    if not isinstance(content, dict):
        raise BenchmarkError(
            f"{path} holds a {type(content).__name__}; expected grades by question, v1_0, ..."
        )
    known = {question.key for question in questions}
    if any(not question.truth for question in questions):
        raise BenchmarkError(f"grades are averaged by capability: {QUESTIONS} has to be in the data folder")
    if strange := [key for key in content if key not in known]:
        raise BenchmarkError(f"{path}: a grade of {strange[0]}, which is no question of {QUESTIONS}")
    if missing := [question.key for question in questions if question.key not in content]:
        raise BenchmarkError(
            f"{path} lacks grades of {len(missing)} questions, such as {missing[0]}; start the judge again"
        )
    runs: dict[str, list[float]] = {}
    for key, row in content.items():
        where = f"{path}, entry {key!r}"
        if not isinstance(row, dict):
            raise BenchmarkError(f"{where}: got {row!r:.40}; expected an object with `score`")
        scores = field_of(row, "score", list, where)
        for value in scores:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise BenchmarkError(f"{where}: a score of {value!r:.40}; expected a number from 0 to 1")
        if not scores or len(scores) != len(next(iter(runs.values()), scores)):
            raise BenchmarkError(
                f"{where}: {len(scores)} scores; expected one for each run, as many as the others have"
            )
        runs[key] = [float(value) for value in scores]
    return {question.key: runs[question.key] for question in questions}


def _table(
    questions: Sequence[Question],
    runs: Mapping[str, Sequence[float]],
    column: str,
    groups_of: Callable[[Question], Sequence[str]],
) -> list[dict[str, Any]]:
    groups: dict[str, list[Sequence[float]]] = {}
    for question in questions:
        for group in groups_of(question):
            groups.setdefault(group, []).append(runs[question.key])
    return [
        {column: name, "score": _rounded(_percents(scores).mean()), "questions": len(scores)}
        for name, scores in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def _percents(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Each run's mean over questions in percent [R], added as the script does: ties are rounded."""
    # One after the other, which neither np.sum nor, from Python 3.12 on, sum does.
    return np.cumsum(scores, axis=0)[-1] / len(scores) * 100


def _rounded(value: float) -> float:
    return float(np.round(value, 1))


NEEDS = f"MM-Vet's {QUESTIONS} (or LLaVA's {LLAVA}) and images/"
MMVET = Benchmark(
    name="mmvet",
    title="MM-Vet",
    headline="total",
    unit="%",
    needs=NEEDS,
    read=read,
    score=score,
    submit=submit,
    max_new_tokens=1024,
)
