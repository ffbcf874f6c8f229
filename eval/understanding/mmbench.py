"""MMBench, English development split: circular evaluation of letters (arXiv 2307.06281).

Every question is asked once for each rotation of its options, a row of its own with 1,000,000 added to the
index, and counts if all are answered rightly. Letters are taken out of answers by VLMEvalKit's exact
matching, without a judge; lmms-eval's rule stands beside it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.benchmark_files import find_file
from eval.understanding.benchmark import Benchmark, Question, Scores
from eval.understanding.letters import infer_letter, lmms_letter
from eval.understanding.option_tables import LETTERS, OptionRow, percent, read_option_table

ROTATION = 1_000_000  # between the indices of a question's rotations


def read(folder: Path, pictures: bool = True) -> list[Question]:
    """The rows of the TSV, rotations of a question in one group."""
    path = find_file(folder, "mmbench_dev*.tsv", "*MMBench*DEV*EN*.tsv", "*.tsv", what=NEEDS)
    return [
        replace(question, group=str(question.truth.index % ROTATION))
        for question in read_option_table(path, pictures, NEEDS)
    ]


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> Scores:
    """Circular accuracy in percent: overall, by category and by its group (`l2-category`)."""
    if any(question.truth.answer is None for question in questions):
        notes = ["this split's answers are not public: send the submission to MMBench's server"]
        return Scores(None, {"circular accuracy": None}, notes=notes)
    right = _hits(questions, answers, infer_letter)
    by_lmms = _hits(questions, answers, lmms_letter)
    circular = _circular(questions, right)
    first = [question for question in questions if question.truth.index < ROTATION]
    overall = percent(list(circular.values()))
    return Scores(
        value=overall,
        figures={
            "circular accuracy": overall,
            "vanilla accuracy (first rotations)": percent([right[q.key] for q in first]),
            "vanilla accuracy (all rotations)": percent(list(right.values())),
            "circular accuracy, lmms-eval's letters": percent(list(_circular(questions, by_lmms).values())),
        },
        tables={
            "By l2-category": _table(questions, circular, lambda q: q.truth.l2_category, "l2-category"),
            "By category": _table(questions, circular, lambda q: q.category, "category"),
        },
        per_question=right,
    )


def _hits(
    questions: Sequence[Question],
    answers: Mapping[str, str],
    letter: Callable[[str, Mapping[str, str]], str | None],
) -> dict[str, float]:
    return {
        q.key: float(letter(answers.get(q.key, ""), q.truth.options) == q.truth.answer) for q in questions
    }


def _circular(questions: Sequence[Question], right: Mapping[str, float]) -> dict[str, float]:
    """Whether all rotations are right, by group."""
    found: dict[str, float] = {}
    for question in questions:
        group = str(question.group)
        found[group] = min(found.get(group, 1.0), right[question.key])
    return found


def _table(
    questions: Sequence[Question],
    circular: Mapping[str, float],
    name_of: Callable[[Question], str],
    column: str,
) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, float]] = {}
    for question in questions:
        if name := name_of(question):
            groups.setdefault(name, {})[str(question.group)] = circular[str(question.group)]
    return [
        {column: name, "circular accuracy": percent(list(hits.values())), "questions": len(hits)}
        for name, hits in sorted(groups.items())
    ]


def submit(questions: Sequence[Question], answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the xlsx that MMBench's server takes: the rows with the answers under `prediction`."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise ImportError("MMBench's submission needs openpyxl: pip install 'dualtoken[eval]'") from error
    most = max(4, max(len(question.options) for question in questions))
    book = Workbook()
    sheet = book.active
    sheet.append(["index", "question", *LETTERS[:most], "prediction", "answer", "split"])
    for question in questions:
        row: OptionRow = question.truth
        options = [row.options.get(letter) for letter in LETTERS[:most]]
        values = [row.question, *options, answers.get(question.key, ""), row.answer, row.split or None]
        sheet.append([row.index])
        for column, value in enumerate(values, 2):
            cell = sheet.cell(row=sheet.max_row, column=column)
            if value is not None:
                cell.value = ILLEGAL_CHARACTERS_RE.sub("", value)  # control characters: xlsx has none
                cell.data_type = "s"  # an answer that begins with = is no formula
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "upload.xlsx"
    temporary = path.with_name(f".{path.name}.tmp")
    book.save(temporary)
    temporary.replace(path)
    return [path]


def guessing(questions: Sequence[Question]) -> float:
    """What guessing every rotation anew gives, in percent."""
    groups: dict[str, list[float]] = {}
    for question in questions:
        groups.setdefault(str(question.group), []).append(1 / len(question.options))
    return 100 * sum(math.prod(chances) for chances in groups.values()) / len(groups)


NEEDS = "MMBench's table of the English development split (mmbench_dev_20230712.tsv)"
MMBENCH = Benchmark(
    name="mmbench",
    title="MMBench, English, development",
    headline="circular accuracy",
    unit="%",
    share=True,
    needs=NEEDS,
    read=read,
    score=score,
    submit=submit,
    max_new_tokens=1024,
    chance=guessing,
)
