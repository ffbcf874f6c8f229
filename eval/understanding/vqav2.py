"""VQAv2: short answers against those of ten people (arXiv 1612.00837).

The figure of the table is the official accuracy of the answers as the model gave them; beside it stands that
of the answers as LLaVA's script submits them, normalised before.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.shards.code_shards import write_atomically
from eval.benchmark_files import field_of, find_file, find_images, read_json_file, read_json_lines
from eval.understanding.answers import Row
from eval.understanding.benchmark import SHORT_ANSWER, Benchmark, BenchmarkError, Question, Scores
from eval.understanding.vqa_normalisation import as_submitted, vqa_accuracy

QUESTIONS, ANNOTATIONS = "*OpenEnded_mscoco_*_questions.json", "*mscoco_*_annotations.json"
LLAVA = "llava_vqav2_mscoco_*.jsonl"
PEOPLE = 10


def read(folder: Path, pictures: bool = True) -> list[Question]:
    """The questions of the official file, with people's answers where they are there; else of LLaVA's."""
    if not folder.is_dir():
        raise BenchmarkError(f"no folder {folder}; expected the folder with {NEEDS}")
    official = any(folder.rglob(QUESTIONS))
    rows = list(_official(folder)) if official else list(_llava(folder))
    images: dict[str, Path] = {}
    if pictures:
        names = {row.image: row.where for row in rows if not row.optional}
        subsets = {name.split("_")[1] for name in names if name.startswith("COCO_")}
        folders = [*(folder / one for one in sorted(subsets)), folder / "images", folder]
        found = find_images(folders, [(where, name) for name, where in names.items()])
        images = dict(zip(names, found, strict=True))
    questions: dict[int, Question] = {}
    for row in rows:
        if row.number in questions:
            raise BenchmarkError(f"{row.where}: question_id {row.number} was there before; keep one of them")
        questions[row.number] = Question(
            key=str(row.number),
            question_id=row.number,
            prompt=row.text + SHORT_ANSWER,
            image=None if row.optional else images.get(row.image),
            category=row.truth["question_type"] if row.truth else "default",
            truth=row.truth,
            optional=row.optional,
        )
    if not questions:
        raise BenchmarkError(f"{folder} has no questions; expected {NEEDS}")
    return list(questions.values())


@dataclass(frozen=True)
class Asked:
    """A question as a file has it."""

    where: str
    number: int
    text: str
    image: str
    truth: dict[str, Any] | None = None
    optional: bool = False


def _official(folder: Path) -> Iterator[Asked]:
    files = sorted(folder.rglob(QUESTIONS))
    if len(files) > 1 and all("_test" in path.name for path in files):  # given out together
        return _part_and_whole(files, lambda path: _official_rows(path, {}))
    return _official_rows(find_file(folder, QUESTIONS, what=NEEDS), _annotations(folder))


def _official_rows(path: Path, truths: Mapping[int, dict[str, Any]]) -> Iterator[Asked]:
    content = read_json_file(path)
    rows = field_of(content if isinstance(content, dict) else {}, "questions", list, str(path))
    subset = field_of(content, "data_subtype", str, str(path)).replace("test-dev", "test")
    for index, row in enumerate(rows):
        where = f"{path}, question {index + 1}"
        if not isinstance(row, dict):
            raise BenchmarkError(f"{where}: got {row!r:.40}; expected an object")
        number = field_of(row, "question_id", int, where)
        if truths and number not in truths:
            raise BenchmarkError(f"{where}: question_id {number} has no annotation; is it the same split?")
        image = f"COCO_{subset}_{field_of(row, 'image_id', int, where):012d}.jpg"
        yield Asked(where, number, field_of(row, "question", str, where), image, truths.get(number))


def _annotations(folder: Path) -> dict[int, dict[str, Any]]:
    if not any(folder.rglob(ANNOTATIONS)):
        return {}
    path = find_file(folder, ANNOTATIONS, what=NEEDS)
    content = read_json_file(path)
    truths = {}
    for index, row in enumerate(
        field_of(content if isinstance(content, dict) else {}, "annotations", list, str(path))
    ):
        where = f"{path}, annotation {index + 1}"
        answers = [field_of(one, "answer", str, where) for one in field_of(row, "answers", list, where)]
        if len(answers) != PEOPLE:
            raise BenchmarkError(f"{where}: {len(answers)} answers; expected {PEOPLE}")
        truths[field_of(row, "question_id", int, where)] = {
            "answers": answers,
            "question_type": field_of(row, "question_type", str, where),
            "answer_type": field_of(row, "answer_type", str, where),
        }
    return truths


def _llava(folder: Path) -> Iterator[Asked]:
    files = sorted(folder.rglob(LLAVA))
    if not files:
        raise BenchmarkError(f"{folder} has no {QUESTIONS} and no {LLAVA}; expected {NEEDS}")
    truths = _annotations(folder)
    return _part_and_whole(
        files, lambda path: (replace(row, truth=truths.get(row.number)) for row in _llava_rows(path))
    )


def _part_and_whole(files: Sequence[Path], rows_of: Callable[[Path], Iterator[Asked]]) -> Iterator[Asked]:
    """Questions of test-dev2015; those of test2015 beside it are for the submission alone."""
    part = next((path for path in files if "test-dev" in path.name), files[0])
    rows = list(rows_of(part))
    yield from rows
    asked = {row.number for row in rows}
    for path in files:
        if path != part:
            yield from (replace(row, optional=True) for row in rows_of(path) if row.number not in asked)


def _llava_rows(path: Path) -> Iterator[Asked]:
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        text = field_of(row, "text", str, where).removesuffix(SHORT_ANSWER)
        image = field_of(row, "image", str, where)
        yield Asked(where, field_of(row, "question_id", int, where), text, image)


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> Scores:
    """Official accuracy in percent: overall, by type of question and by type of answer."""
    if any(question.truth is None for question in questions):
        note = "this split's answers are not public: send the submission to the VQA challenge's server"
        return Scores(None, {"accuracy": None}, notes=[note])
    exact: dict[str, float] = {}
    submitted = []
    for question in questions:
        text, people = answers.get(question.key, ""), question.truth["answers"]
        exact[question.key] = vqa_accuracy(text, people)
        submitted.append(vqa_accuracy(as_submitted(text), people))
    overall = _percent(list(exact.values()))
    return Scores(
        value=overall,
        figures={"accuracy": overall, "accuracy as LLaVA submits": _percent(submitted)},
        tables={
            "By answer type": _table(questions, exact, "answer_type"),
            "By question type": _table(questions, exact, "question_type"),
        },
        per_question=exact,
    )


def _table(questions: Sequence[Question], exact: Mapping[str, float], name: str) -> list[dict[str, Any]]:
    groups: dict[str, list[float]] = {}
    for question in questions:
        groups.setdefault(question.truth[name], []).append(exact[question.key])
    return [
        {name.replace("_", " "): group, "accuracy": _percent(scores), "questions": len(scores)}
        for group, scores in groups.items()
    ]


def _percent(scores: Sequence[float]) -> float:
    """The mean in percent, with the two digits that the official script keeps."""
    return round(100 * float(sum(scores)) / len(scores), 2)


def submit(questions: Sequence[Question], answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the challenge's JSON, answers normalised by LLaVA's script, "" where there are none."""
    rows = [
        {"question_id": question.question_id, "answer": as_submitted(answers.get(question.key, ""))}
        for question in questions
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "upload.json"
    write_atomically(path, json.dumps(rows, ensure_ascii=False))
    return [path]


def read_results(path: Path) -> Iterator[Row]:
    """Rows of results in the challenge's form, `[{question_id, answer}]`."""
    content = read_json_file(path)
    if not isinstance(content, list):
        raise BenchmarkError(f"{path} holds a {type(content).__name__}; expected a list of answers, or JSONL")
    for index, row in enumerate(content):
        where = f"{path}, entry {index + 1}"
        if not isinstance(row, dict):
            raise BenchmarkError(f"{where}: got {row!r:.40}; expected an object")
        yield where, str(field_of(row, "question_id", int, where)), None, field_of(row, "answer", str, where)


NEEDS = (
    "VQAv2's questions and annotations (v2_*.json), or LLaVA's llava_vqav2_mscoco_*.jsonl, and the pictures"
)
VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    headline="accuracy",
    unit="%",
    share=True,
    needs=NEEDS,
    read=read,
    score=score,
    submit=submit,
    read_results=read_results,
)
