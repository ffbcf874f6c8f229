"""The pictures of questions: read once for all questions about the same one."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from eval.understanding.benchmark import BenchmarkError, Question

T = TypeVar("T")


def picture_bytes(question: Question) -> bytes:
    """The encoded picture of a question.

    Raises:
        BenchmarkError: its file is gone.
    """
    if isinstance(question.image, bytes):
        return question.image
    try:
        return question.image.read_bytes()
    except OSError as error:
        raise undecodable(question, error.strerror or str(error)) from error


def undecodable(question: Question, reason: str) -> BenchmarkError:
    """What to raise where a question's picture cannot be read."""
    where = "" if isinstance(question.image, bytes) else f" {question.image}"
    return BenchmarkError(
        f"question {question.question_id}: its picture{where} cannot be used: {reason}; "
        "copy the file again or take the question out"
    )


def for_each_picture(questions: Sequence[Question], make: Callable[[list[Question]], Sequence[T]]) -> list[T]:
    """What `make` gives for the picture of each question, asked once for each picture."""
    first: dict[object, Question] = {}
    for question in questions:
        first.setdefault(question.image, question)
    made = dict(zip(first, make(list(first.values())), strict=True))
    return [made[question.image] for question in questions]
