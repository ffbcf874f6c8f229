"""AI2D: diagrams of school books (arXiv 1603.07396), as VLMEvalKit gives them out and scores them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmark_files import find_file
from eval.understanding.benchmark import Benchmark, BenchmarkError, Question, Scores
from eval.understanding.letters import infer_letter, science_qa_letter
from eval.understanding.option_tables import chance, percent, read_option_table

MISSING = ("", "nan")  # "none" is an answer to "What eats hawks?"
NEEDS = "VLMEvalKit's table AI2D_TEST.tsv"


def read(folder: Path, pictures: bool = True) -> list[Question]:
    """The rows of the TSV."""
    path = find_file(folder, "AI2D_TEST*.tsv", "*.tsv", what=NEEDS)
    questions = read_option_table(path, pictures, NEEDS, MISSING)
    without = next((q for q in questions if q.truth.answer is None), None)
    if without is not None:
        raise BenchmarkError(f"{path}: index {without.question_id} has no answer; expected a letter")
    return questions


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> Scores:
    """Accuracy in percent, overall and by category."""
    right = {
        q.key: float(infer_letter(answers.get(q.key, ""), q.truth.options) == q.truth.answer)
        for q in questions
    }
    categories: dict[str, list[float]] = {}
    for question in questions:
        categories.setdefault(question.category, []).append(right[question.key])
    rows = [
        {"category": name, "accuracy": percent(hits), "questions": len(hits)}
        for name, hits in sorted(categories.items())
    ]
    overall = percent(list(right.values()))
    llava = [science_qa_letter(answers.get(q.key, "")) == q.truth.answer for q in questions]
    figures = {"accuracy": overall, "accuracy, letters as LLaVA's for ScienceQA": percent(llava)}
    return Scores(overall, figures, {"By category": rows}, right)


AI2D = Benchmark(
    name="ai2d",
    title="AI2D",
    headline="accuracy",
    unit="%",
    share=True,
    needs=NEEDS,
    read=read,
    score=score,
    chance=chance,
)
