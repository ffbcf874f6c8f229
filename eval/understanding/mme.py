"""MME: two questions to each picture, one answered by yes and one by no (arXiv 2306.13394).

A category scores 100 x accuracy + 100 x the share of pictures with both answers right. The figure of the
table is perception, the sum over its ten categories; cognition stands beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from data_pipeline.shards.code_shards import write_atomically
from data_pipeline.shards.image_text_shards import IMAGE_EXTENSIONS
from eval.understanding.benchmark import SHORT_ANSWER, Benchmark, BenchmarkError, Question, Scores

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = (*PERCEPTION, *COGNITION)
INSTRUCTION = "Please answer yes or no."  # LLaVA asks for a single word or phrase instead
IMAGES, TEXTS = "images", "questions_answers_YN"  # folders that some categories have
READ = 4  # characters of an answer that is neither yes nor no alone


def read(folder: Path, pictures: bool = True) -> list[Question]:
    """The questions of the categories' folders; of files of results where only answers are scored."""
    categories = _categories(folder)
    if not categories:
        results = {name: folder / f"{name}.txt" for name in CATEGORIES if (folder / f"{name}.txt").is_file()}
        if results and not pictures:
            return [
                _question(category, image, text, truth, None, where)
                for category, path in results.items()
                for where, (image, text, truth, _) in _fields(path, 4)
            ]
        raise BenchmarkError(f"{folder} has no folder {' or '.join(CATEGORIES[:3])}, ...; expected {NEEDS}")
    questions = []
    for category, place in categories.items():
        texts = place / TEXTS if (place / TEXTS).is_dir() else place
        shown = place / IMAGES if (place / IMAGES).is_dir() else place
        images = {path.stem: path for path in shown.iterdir() if path.suffix[1:].lower() in IMAGE_EXTENSIONS}
        for path in sorted(texts.glob("*.txt")):
            if path.stem not in images and pictures:
                raise BenchmarkError(f"{path}: no picture {path.stem}.jpg or .png in {shown}")
            image = images.get(path.stem)
            name = image.name if image else f"{path.stem}.jpg"
            rows = list(_fields(path, 2))
            if sorted(truth for _, (_, truth) in rows) != ["No", "Yes"]:
                found = [truth for _, (_, truth) in rows]
                raise BenchmarkError(
                    f"{path}: answers are {found}; expected two questions, one Yes and one No"
                )
            for where, (text, truth) in rows:
                questions.append(_question(category, name, text, truth, image if pictures else None, where))
    if not questions:
        raise BenchmarkError(f"{folder} has no questions in its categories; expected {NEEDS}")
    return questions


def _categories(folder: Path) -> dict[str, Path]:
    """Folders of the categories, in the folder or the one of MME's release in it."""
    if not folder.is_dir():
        raise BenchmarkError(f"no folder {folder}; expected {NEEDS}")
    for place in (folder, folder / "MME_Benchmark_release_version", *sorted(folder.glob("*/MME_Benchmark*"))):
        found = {name: place / name for name in CATEGORIES if (place / name).is_dir()}
        if found:
            return found
    return {}


def _fields(path: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise BenchmarkError(f"{path} is no text file (UTF-8)") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = line.split("\t")
            where = f"{path}, line {number}"
            if len(fields) != count:
                raise BenchmarkError(f"{where}: {len(fields)} fields; expected {count} between tabs")
            yield where, [field.strip() for field in fields]


def _question(category: str, image: str, text: str, truth: str, picture: Path | None, where: str) -> Question:
    if truth not in ("Yes", "No"):
        raise BenchmarkError(f"{where}: the answer is {truth!r}; expected Yes or No")
    prompt = text.replace(INSTRUCTION, "").strip() + SHORT_ANSWER
    question_id = f"{category}/{image}"
    return Question(
        key=f"{question_id}\t{prompt}",
        question_id=question_id,
        prompt=prompt,
        image=picture,
        category=category,
        options=("Yes", "No"),
        truth=truth,
        group=question_id,
    )


def read_results(path: Path) -> Iterator[tuple[str, str, str | None, str]]:
    """Rows of a folder of `<category>.txt`, `picture, question, answer, prediction` between tabs."""
    files = [path / f"{name}.txt" for name in CATEGORIES] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            for where, (image, text, truth, said) in _fields(file, 4):
                asked = _question(file.stem, image, text, truth, None, where)
                yield where, str(asked.question_id), asked.prompt, said


def same_id(question_id: str) -> str:
    """Category and picture: LLaVA's files name its folder `images` as well, or its `.txt`."""
    path = PurePosixPath(question_id)
    return f"{path.parts[0] if path.parts else ''}/{path.stem}"


def parse(text: str) -> str:
    """`yes`, `no` or `other`: the whole answer, else yes, else no among its first four characters."""
    lowered = text.lower()
    if lowered in ("yes", "no"):
        return lowered
    start = lowered[:READ]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> Scores:
    """Scores by category, perception and cognition, as the authors' script adds them up."""
    said = {question.key: parse(_one_line(answers.get(question.key, ""))) for question in questions}
    right = {q.key: float(said[q.key] == q.truth.lower()) for q in questions}
    rows = []
    for category in CATEGORIES:
        asked = [question for question in questions if question.category == category]
        if not asked:
            continue
        both: dict[str | None, float] = {}
        for question in asked:
            both[question.group] = min(both.get(question.group, 1.0), right[question.key])
        accuracy = sum(right[question.key] for question in asked) / len(asked)
        plus = sum(both.values()) / len(both)
        rows.append(
            {
                "category": category,
                "score": 100 * accuracy + 100 * plus,
                "accuracy": 100 * accuracy,
                "both right": 100 * plus,
                **_confusion([(said[question.key], question.truth) for question in asked]),
                "questions": len(asked),
            }
        )
    scores = {str(row["category"]): float(row["score"]) for row in rows}
    perception = [scores[name] for name in PERCEPTION if name in scores]
    cognition = [scores[name] for name in COGNITION if name in scores]
    figures = {
        "perception": sum(perception) if perception else None,
        "cognition": sum(cognition) if cognition else None,
    }
    missing = [name for name in CATEGORIES if name not in scores]
    notes = [f"no questions of {', '.join(missing)}: sums are over the other categories"] if missing else []
    return Scores(figures["perception"], figures, {"By category": rows}, right, notes)


def _confusion(pairs: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Counts of answers against truths, as the authors' script prints them; yes is positive."""
    kinds = {"TP": ("yes", "Yes"), "FN": ("no", "Yes"), "TN": ("no", "No"), "FP": ("yes", "No")}
    counts = {name: pairs.count(kind) for name, kind in kinds.items()}
    return {**counts, "neither": sum(answer == "other" for answer, _ in pairs)}


def submit(questions: Sequence[Question], answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write `<category>.txt` for the authors' calculation.py, a picture's two lines together."""
    folder = folder / "results"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for category in dict.fromkeys(question.category for question in questions):
        asked = sorted((q for q in questions if q.category == category), key=lambda q: str(q.group))
        lines = [
            "\t".join(
                (
                    str(question.question_id).split("/", 1)[1],
                    f"{question.prompt.removesuffix(SHORT_ANSWER)} {INSTRUCTION}",
                    question.truth,
                    _one_line(answers.get(question.key, "")),
                )
            )
            for question in asked
        ]
        paths.append(folder / f"{category}.txt")
        write_atomically(paths[-1], "".join(f"{line}\n" for line in lines))
    return paths


def _one_line(text: str) -> str:
    """A text as a field of a file of results, which is what the authors' script sees."""
    return " ".join(text.split())


def guessing(questions: Sequence[Question]) -> float:
    """What yes or no by a coin gives: half of the answers and a quarter of the pictures, by category."""
    return 75.0 * len({q.category for q in questions if q.category in PERCEPTION})


NEEDS = "MME's release: a folder for each category with pictures and their .txt of two questions"
MME = Benchmark(
    name="mme",
    title="MME",
    headline="perception",
    unit="",
    needs=NEEDS,
    read=read,
    score=score,
    submit=submit,
    chance=guessing,
    answers_by_prompt=True,
    same_id=same_id,
    read_results=read_results,
)
