"""Tables of multiple-choice questions as VLMEvalKit gives them out: a TSV with the pictures in base64.

Columns are `index, question, A, B, ..., answer, image`, and where there are any `hint`, `category`,
`l2-category`, `split`. Options stop at the first that is missing, as in LLaVA's prompts. An `image` that is
a number stands for the picture of the row of that index.
"""

import base64
import binascii
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.benchmark_files import BenchmarkError, read_table
from eval.understanding.benchmark import LETTER_ANSWER, Question

LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H")
MISSING = {"", "nan", "none"}
LONGEST_REFERENCE = 16  # characters; a picture has more


@dataclass(frozen=True)
class OptionRow:
    """A row as scoring needs it."""

    index: int
    question: str
    options: dict[str, str]  # words by letter
    answer: str | None  # None where the split's answers are not public
    l2_category: str
    split: str

    def __str__(self) -> str:
        """The true option, for a reader."""
        return f"{self.answer}. {self.options[self.answer]}" if self.answer else "not public"


def read_option_table(
    path: Path, pictures: bool, what: str, missing: Collection[str] = MISSING
) -> list[Question]:
    """The questions of a TSV, `truth` an `OptionRow`, with LLaVA's prompt.

    Args:
        path: of the table.
        pictures: whether the pictures are needed.
        what: the table, for errors.
        missing: what stands, in any case, for an option that there is not.

    Raises:
        BenchmarkError: the table cannot be read; the message names the line.
    """
    rows = []
    lines: dict[int, int] = {}
    for line, row in read_table(path, ("index", "question", "A", "B", "image")):
        where = f"{path}, line {line}"
        try:
            index = int(row["index"])
        except ValueError:
            raise BenchmarkError(f"{where}: index is {row['index']!r:.40}; expected a number") from None
        if index in lines:
            raise BenchmarkError(f"{where}: index {index} is that of line {lines[index]}; keep one of them")
        lines[index] = line
        rows.append((index, where, row))
    if not rows:
        raise BenchmarkError(f"{path} has no rows; expected {what}")
    images = {index: row["image"].strip() for index, _, row in rows}
    return [
        _question(index, where, row, _image(index, images, where) if pictures else None, missing)
        for index, where, row in rows
    ]


def present(row: dict[str, str], name: str, missing: Collection[str] = MISSING) -> str:
    """A column's text; empty where the column or the value is missing, `nan` or `none`."""
    text = row.get(name) or ""
    return "" if text.strip().lower() in missing else text


def _question(
    index: int, where: str, row: dict[str, str], image: bytes | None, missing: Collection[str]
) -> Question:
    options: dict[str, str] = {}
    for letter in LETTERS:
        words = present(row, letter, missing)
        if not words:
            break
        options[letter] = words
    if len(options) < 2:
        raise BenchmarkError(f"{where}: {len(options)} options; expected two or more, from A on")
    answer = present(row, "answer").strip() or None
    if answer is not None and answer not in options:
        raise BenchmarkError(f"{where}: answer is {answer!r}; expected one of {', '.join(options)}")
    listed = "".join(f"\n{letter}. {words}" for letter, words in options.items())
    hint = present(row, "hint")
    recorded = f"{hint}\n{row['question']}{listed}" if hint else f"{row['question']}{listed}"
    return Question(
        key=str(index),
        question_id=index,
        prompt=recorded + LETTER_ANSWER,
        image=image,
        category=present(row, "category") or "all",
        options=tuple(options),
        truth=OptionRow(
            index, row["question"], options, answer, present(row, "l2-category"), present(row, "split")
        ),
        recorded_prompt=recorded,
        extra={"round_id": 0, "options": list(options.values()), "option_char": list(options)},
    )


def _image(index: int, images: dict[int, str], where: str) -> bytes:
    text, seen = images[index], {index}
    while len(text) <= LONGEST_REFERENCE and text.isdigit():
        index = int(text)
        if index not in images or index in seen:
            raise BenchmarkError(f"{where}: image is {text!r}, and no row of that index has a picture")
        seen.add(index)
        text = images[index]
    try:
        picture = base64.b64decode(text, validate=True)
    except binascii.Error:
        picture = b""
    if not picture:
        raise BenchmarkError(f"{where}: image is {text[:20]!r}; expected a picture in base64")
    return picture


def percent(hits: Sequence[float]) -> float | None:
    """The share of hits in percent; None of nothing."""
    return 100 * sum(hits) / len(hits) if hits else None


def chance(questions: Sequence[Question]) -> float:
    """What guessing an option gives, in percent."""
    return 100 * sum(1 / len(question.options) for question in questions) / len(questions)
