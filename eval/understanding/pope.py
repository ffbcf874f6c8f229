"""POPE (arXiv 2305.10355): is there such an object in the picture?

Answers are read as by LLaVA's script: `no` by three words, `yes` whatever else. They are paired with labels
by id, where that script goes by order. The figure of the table is the mean F1 of the three files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmark_files import field_of, find_images, read_json_lines
from eval.understanding.benchmark import SHORT_ANSWER, Benchmark, BenchmarkError, Question, Scores

# LLaVA numbers the questions of the three files apart.
CATEGORIES = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}
NO = {"No", "no", "not"}
WRONG = {"yes": "no", "no": "yes"}
IMAGES = ("val2014", "images", "")


def read(folder: Path, pictures: bool = True) -> list[Question]:
    """The questions of `coco_pope_*.json`, numbered as in LLaVA's `llava_pope_test.jsonl`."""
    if not folder.is_dir():
        raise BenchmarkError(f"no folder {folder}; expected the folder with {NEEDS}")
    rows: list[tuple[str, str, int, dict]] = []  # where, category, id, row
    for category, offset in CATEGORIES.items():
        files = sorted(folder.rglob(f"*pope_{category}.json*"))
        if len(files) != 1:
            raise BenchmarkError(f"{folder} has {len(files)} files *pope_{category}.json; expected {NEEDS}")
        for number, row in read_json_lines(files[0]):
            where = f"{files[0]}, line {number}"
            rows.append((where, category, offset + field_of(row, "question_id", int, where), row))
    names = [(where, field_of(row, "image", str, where)) for where, _, _, row in rows]
    images = find_images([folder / name for name in IMAGES], names) if pictures else [None] * len(rows)
    questions: dict[int, Question] = {}
    for (where, category, number, row), image in zip(rows, images, strict=True):
        if number in questions:
            raise BenchmarkError(f"{where}: a question of this id was there before; keep one of them")
        label = field_of(row, "label", str, where)
        if label not in ("yes", "no"):
            raise BenchmarkError(f"{where}: label is {label!r}; expected yes or no")
        questions[number] = Question(
            key=str(number),
            question_id=number,
            prompt=field_of(row, "text", str, where) + SHORT_ANSWER,
            image=image,
            category=category,
            options=("Yes", "No"),
            truth=label,
        )
    return list(questions.values())


def parse(text: str) -> str:
    """`no` if a word before the first point is No, no or not; `yes` for everything else, also for nothing."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if NO.intersection(words) else "yes"


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> Scores:
    """Accuracy, precision, recall and F1 of `yes`, and how often it is said, in percent, by file.

    An empty answer is yes, as in LLaVA's script; a missing one counts as wrong.
    """
    parsed = {
        question.key: parse(answers[question.key]) if question.key in answers else WRONG[question.truth]
        for question in questions
    }
    rows = []
    for category in CATEGORIES:
        asked = [question for question in questions if question.category == category]
        if asked:
            rows.append({"category": category, **_rates(asked, parsed), "questions": len(asked)})
    mean = sum(row["F1"] for row in rows) / len(rows)
    pooled = _rates(questions, parsed)
    return Scores(
        value=mean,
        figures={"mean F1": mean, **{f"{name}, all together": value for name, value in pooled.items()}},
        tables={"By category": rows},
        per_question={question.key: float(parsed[question.key] == question.truth) for question in questions},
    )


def _rates(questions: Sequence[Question], parsed: Mapping[str, str]) -> dict[str, float]:
    pairs = [(parsed[question.key], question.truth) for question in questions]
    hits = sum(pair == ("yes", "yes") for pair in pairs)
    said = sum(answer == "yes" for answer, _ in pairs)
    true = sum(truth == "yes" for _, truth in pairs)
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    harmonic = 2 * precision * recall / (precision + recall) if hits else 0.0
    rates = {
        "F1": harmonic,
        "accuracy": sum(answer == truth for answer, truth in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "yes ratio": said / len(pairs),
    }
    return {name: 100 * value for name, value in rates.items()}


def blind(questions: Sequence[Question]) -> float:
    """The mean F1 of saying yes to everything: of all ways to answer without looking the best one."""
    return score(questions, {question.key: "Yes" for question in questions}).figures["mean F1"] or 0.0


NEEDS = (
    "POPE's coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, pictures in val2014/"
)
POPE = Benchmark(
    name="pope",
    title="POPE",
    headline="mean F1",
    unit="%",
    needs=NEEDS,
    read=read,
    score=score,
    chance=blind,
)
