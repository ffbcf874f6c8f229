"""TextVQA, validation: short answers about text in pictures (arXiv 1904.08920), in LLaVA's layout.

Answers are compared as by M4C's evaluator, which LLaVA uses. The example of how to add a benchmark: reading,
scoring, and one `Benchmark` that the registry names.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmark_files import field_of, find_file, find_images, read_json_file, read_json_lines
from eval.understanding.benchmark import Benchmark, BenchmarkError, Question, Scores
from eval.understanding.vqa_normalisation import as_submitted, mean_agreement

NEEDS = "LLaVA's llava_textvqa_val_v051_ocr.jsonl, TextVQA_0.5.1_val.json and train_images/"


def read(folder: Path, pictures: bool = True) -> list[Question]:
    """LLaVA's questions with the answers of TextVQA's file, found by picture and question."""
    asked = find_file(folder, "llava_textvqa_val*.jsonl", what=NEEDS)
    known = find_file(folder, "TextVQA_*_val.json", what=NEEDS)
    content = read_json_file(known)
    truths = {}
    for index, row in enumerate(field_of(content, "data", list, str(known))):
        where = f"{known}, entry {index + 1}"
        question = field_of(row, "question", str, where).lower()
        truths[field_of(row, "image_id", str, where), question] = field_of(row, "answers", list, where)
    rows = [(f"{asked}, line {number}", row) for number, row in read_json_lines(asked)]
    names = [(where, field_of(row, "image", str, where)) for where, row in rows]
    images = find_images([folder / "train_images", folder], names) if pictures else [None] * len(rows)
    questions: list[Question] = []
    times: Counter[str] = Counter()  # two people may have asked the same
    for (where, row), image in zip(rows, images, strict=True):
        text = field_of(row, "text", str, where)
        name = field_of(row, "question_id", (str, int), where)  # the picture's id; several questions share it
        truth = truths.get((str(name), text.split("\n")[0].lower()))
        if truth is None:
            raise BenchmarkError(f"{where}: {known.name} has no answers to this question of picture {name}")
        same = f"{name}\t{text}"
        times[same] += 1
        key = same if times[same] == 1 else f"{same}\t{times[same]}"
        questions.append(Question(key, name, text, image, truth=truth))
    return questions


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> Scores:
    """Accuracy in percent: the mean agreement with ten people, all in the processor's normal form."""
    agreement = {
        question.key: mean_agreement(
            as_submitted(answers.get(question.key, "")), [as_submitted(one) for one in question.truth]
        )
        for question in questions
    }
    value = 100 * sum(agreement.values()) / len(agreement)
    return Scores(value, {"accuracy": value}, per_question=agreement)


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA, validation",
    headline="accuracy",
    unit="%",
    share=True,
    needs=NEEDS,
    read=read,
    score=score,
    answers_by_prompt=True,
)
