"""Answers as they come, a file for each rank: nothing that was answered is lost when a rank is killed."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.understanding.benchmark import BenchmarkError, Question


@dataclass(frozen=True)
class Answer:
    """What a model said to a question, and what answer files keep beside it under `metadata`."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class PartWriter:
    """A rank's file, to append to; used in a `with` statement, by one process at a time.

    A last line that a killed process left torn is dropped.

    Raises:
        BenchmarkError: another process is writing the file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"part-{rank:05d}.jsonl"
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process
        except BlockingIOError:
            self._file.close()
            raise BenchmarkError(
                f"another process writes {self.path}; wait for its end, or name another output folder"
            ) from None
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def write(self, question: Question, answer: Answer) -> None:
        """Append an answer; `flush` keeps it."""
        line = {"key": question.key, "question": identity(question)}
        line |= {"text": answer.text, "metadata": dict(answer.metadata)}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def flush(self) -> None:
        """Give what was written to the operating system: it outlives this process."""
        self._file.flush()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())  # before other ranks are relied on to see it
        self._file.close()


def identity(question: Question) -> str:
    """What an answer is kept under: a hash of all that is asked, of a picture's file only the name."""
    image = question.image.name.encode() if isinstance(question.image, Path) else question.image
    asked = json.dumps([question.key, question.prompt, *question.options]).encode()
    return hashlib.sha256(asked + b"\0" + image).hexdigest()[:20]


def read_parts(folder: Path) -> dict[str, Answer]:
    """The answers of all ranks by `identity` of their question; a torn last line is none.

    Raises:
        BenchmarkError: a line is not one that `PartWriter` writes.
    """
    answers: dict[str, Answer] = {}
    for path in sorted(folder.glob("part-*.jsonl")):
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                answers.setdefault(row["question"], Answer(row["text"], row["metadata"]))
            except (ValueError, KeyError, TypeError):
                raise BenchmarkError(
                    f"{path}, line {number}: no answer ({line[:40]!r}); delete the line and its question "
                    "is asked again"
                ) from None
    return answers
