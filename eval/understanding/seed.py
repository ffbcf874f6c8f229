"""SEED-Bench, its image part: letters of four options, nine types of questions (arXiv 2307.16125).

The figure of the table is LLaVA's: the answer has to be the letter, nothing else. lmms-eval's rule, the first
character in any case, stands beside it. Types 10 to 12 are about videos; they are scored only where
somebody answered them, and never counted with the images.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.shards.code_shards import write_atomically
from eval.benchmark_files import field_of, find_file, find_image, read_json_file, read_json_lines
from eval.understanding.benchmark import LETTER_ANSWER, Benchmark, BenchmarkError, Question, Scores
from eval.understanding.letters import first_letter

QUESTIONS, IMAGES = "SEED-Bench.json", "SEED-Bench-image"
LLAVA, VIDEO_FRAMES = "llava-seed-bench.jsonl", "SEED-Bench-video-image/"
LETTERS = ("A", "B", "C", "D")
NAMES = (
    *("Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location"),
    *("Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning"),
    *("Text Understanding", "Action Recognition", "Action Prediction", "Procedure Understanding"),
)
IMAGE_TYPES = 9


def read(folder: Path, pictures: bool = True) -> list[Question]:
    """The questions of `SEED-Bench.json`, with LLaVA's prompt; those about videos are never asked.

    Where LLaVA's file alone is there, its questions, which come without the true letters.
    """
    path = find_file(folder, QUESTIONS, LLAVA, what=NEEDS)
    questions = list(
        _of_llava(path, folder, pictures) if path.name == LLAVA else _of_authors(path, folder, pictures)
    )
    if all(question.optional for question in questions):
        raise BenchmarkError(f"{path} has no questions about images (question_type_id 1 to {IMAGE_TYPES})")
    return questions


def _of_authors(path: Path, folder: Path, pictures: bool) -> Iterator[Question]:
    content = read_json_file(path)
    names = _type_names(content)
    for where, row in _rows(content, path):
        number = field_of(row, "question_type_id", int, where)
        if number not in names:
            raise BenchmarkError(f"{where}: question_type_id {number}; expected one of {sorted(names)}")
        video = number > IMAGE_TYPES
        truth = field_of(row, "answer", str, where)
        if truth not in LETTERS:
            raise BenchmarkError(f"{where}: answer is {truth!r}; expected one of {', '.join(LETTERS)}")
        choices = [field_of(row, f"choice_{letter.lower()}", (str, int, float), where) for letter in LETTERS]
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))
        name = field_of(row, "data_id", str, where)
        folders = [folder / IMAGES, path.parent / IMAGES, folder]
        yield Question(
            key=str(row["question_id"]),
            question_id=_as_llava(row["question_id"]),
            prompt=f"{field_of(row, 'question', str, where)}\n{options}{LETTER_ANSWER}",
            image=find_image(folders, name, where) if pictures and not video else None,
            category=names[number],
            options=LETTERS,
            truth=truth,
            optional=video,
        )


def _of_llava(path: Path, folder: Path, pictures: bool) -> Iterator[Question]:
    for where, row in _unrepeated((f"{path}, line {number}", row) for number, row in read_json_lines(path)):
        name = field_of(row, "image", str, where)
        video = name.startswith(VIDEO_FRAMES)
        yield Question(
            key=str(row["question_id"]),
            question_id=_as_llava(row["question_id"]),
            prompt=field_of(row, "text", str, where),
            image=find_image([folder, path.parent], name, where) if pictures and not video else None,
            category=str(row.get("category", "default")),
            options=LETTERS,
            optional=video,
        )


def _as_llava(question_id: str | int) -> str | int:
    """An id as LLaVA's answer files bear it: its script finds no other."""
    return int(question_id) if str(question_id).isdecimal() else question_id


def _rows(content: Any, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = content.get("questions") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path} has no list `questions`; expected {NEEDS}")
    yield from _unrepeated((f"{path}, question {number}", row) for number, row in enumerate(rows, 1))


def _unrepeated(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    seen: dict[str, str] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise BenchmarkError(f"{where}: got {row!r:.40}; expected an object")
        key = str(field_of(row, "question_id", (str, int), where))
        if key in seen:
            raise BenchmarkError(f"{where}: question_id {key} is that of {seen[key]}; keep one of them")
        seen[key] = where.rpartition(", ")[2]
        yield where, row


def _type_names(content: Any) -> dict[int, str]:
    """Names of the types by number, the file's own if it has them."""
    own = content.get("question_type") if isinstance(content, dict) else None
    if isinstance(own, dict) and all(isinstance(number, int) for number in own.values()):
        return {number: name for name, number in own.items()}
    return dict(enumerate(NAMES, 1))


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> Scores:
    """Accuracy in percent over the images and by type, by LLaVA's rule and by lmms-eval's."""
    if any(question.truth is None for question in questions):
        note = f"not scored: {LLAVA} has no true letters; put {QUESTIONS} beside it, or send the submission"
        return Scores(None, {"image accuracy": None}, notes=[note])
    asked = [question for question in questions if not question.optional or question.key in answers]
    exact = {q.key: float(answers.get(q.key, "") == q.truth) for q in asked}
    first = {q.key: float(first_letter(answers.get(q.key, "")).upper() == q.truth) for q in asked}
    types: dict[str, list[str]] = {}
    for question in asked:
        types.setdefault(question.category, []).append(question.key)
    images = [q.key for q in asked if not q.optional]
    videos = [q.key for q in asked if q.optional]
    figures = {
        "image accuracy": _percent(exact, images),
        "image accuracy, first letter (lmms-eval)": _percent(first, images),
    }
    if videos:
        figures |= {
            "video accuracy": _percent(exact, videos),
            "video accuracy, first letter (lmms-eval)": _percent(first, videos),
            "total accuracy": _percent(exact, [*images, *videos]),
            "total accuracy, first letter (lmms-eval)": _percent(first, [*images, *videos]),
        }
    rows = [
        {
            "type": name,
            "accuracy": _percent(exact, keys),
            "accuracy, first letter": _percent(first, keys),
            "questions": len(keys),
        }
        for name, keys in types.items()
    ]
    return Scores(figures["image accuracy"], figures, {"By type": rows}, exact)


def _percent(hits: Mapping[str, float], keys: Sequence[str]) -> float | None:
    return 100 * sum(hits[key] for key in keys) / len(keys) if keys else None


def submit(questions: Sequence[Question], answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the leaderboard's JSONL, `{question_id, prediction}` a line."""
    rows = (
        {"question_id": q.key, "prediction": answers.get(q.key, "")}
        for q in questions
        if not q.optional or q.key in answers
    )
    path = folder / "upload.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return [path]


NEEDS = f"{QUESTIONS} (or LLaVA's {LLAVA}) and the pictures in {IMAGES}/"
SEED = Benchmark(
    name="seed",
    title="SEED-Bench, images",
    headline="image accuracy",
    unit="%",
    share=True,
    needs=NEEDS,
    read=read,
    score=score,
    submit=submit,
    chance=lambda _: 25.0,
)
