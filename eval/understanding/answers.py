"""Answer files in LLaVA's form, JSONL of `{question_id, prompt, text, answer_id, model_id, metadata}`."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.benchmark_files import field_of, read_json_lines
from eval.understanding.benchmark import Benchmark, BenchmarkError, Question

SHOWN = 3  # missing questions named in an error


def answer_row(question: Question, text: str, model_id: str) -> dict[str, Any]:
    """The row of an answer file."""
    return {
        "question_id": question.question_id,
        **({"round_id": question.extra["round_id"]} if "round_id" in question.extra else {}),
        "prompt": _recorded(question),
        "text": text,
        **{name: value for name, value in question.extra.items() if name != "round_id"},
        "answer_id": hashlib.sha256(question.key.encode()).hexdigest()[:22],
        "model_id": model_id,
        "metadata": {},
    }


def read_answers(
    path: Path, benchmark: Benchmark, questions: Sequence[Question], allow_missing: bool = False
) -> dict[str, str]:
    """Texts by question key, of an answer file or of results in the benchmark's own form.

    Args:
        path: JSONL, or what the benchmark's `read_results` takes.
        benchmark: whose questions they answer.
        questions: all that may be answered.
        allow_missing: whether questions may lack an answer; lines that cannot be read are none.

    Raises:
        BenchmarkError: a row does not fit, answers a question that is unknown or answered before, or
            questions lack an answer; the message names the line.
    """
    if benchmark.read_results is not None and path.suffix != ".jsonl":
        rows = benchmark.read_results(path)
    else:
        rows = _rows(path, allow_missing)
    keys: dict[tuple[str, str | None], list[str]] = {}
    for question in questions:
        for name in _names(benchmark, question):
            keys.setdefault(name, []).append(question.key)
    found: dict[str, str] = {}
    places: dict[str, str] = {}
    for where, question_id, prompt, text in rows:
        same = keys.get((benchmark.same_id(question_id), prompt if benchmark.answers_by_prompt else None))
        if same is None:
            asked = f" with the prompt {prompt!r:.60}" if benchmark.answers_by_prompt else ""
            raise BenchmarkError(
                f"{where}: no question {question_id}{asked} in {benchmark.name}; is it another split's file?"
            )
        # A file that asks the same twice has two answers, whose order does not matter: the same was asked.
        key = next((key for key in same if key not in found), None)
        if key is None:
            raise BenchmarkError(
                f"{where}: question {question_id} was answered before, at {places[same[0]]}; keep one of them"
            )
        found[key], places[key] = text, where
    missing = [str(q.question_id) for q in questions if q.key not in found and not q.optional]
    if missing and not allow_missing:
        raise BenchmarkError(
            f"{path} lacks answers to {len(missing)} of {len(questions)} questions, such as "
            f"{', '.join(missing[:SHOWN])}; --allow-missing counts them as wrong"
        )
    return found


Row = tuple[str, str, str | None, str]
"""Where it stands, question id, prompt, text."""


def _rows(path: Path, torn: bool) -> Iterator[Row]:
    for number, row in read_json_lines(path, torn):
        where = f"{path}, line {number}"
        question_id = field_of(row, "question_id", (str, int), where)
        prompt = row.get("prompt")
        if prompt is not None and not isinstance(prompt, str):
            raise BenchmarkError(f"{where}: field 'prompt' is {prompt!r:.60}; expected str")
        text = field_of(
            row, "prediction" if "text" not in row and "prediction" in row else "text", str, where
        )
        yield where, str(question_id), prompt, text


def _names(benchmark: Benchmark, question: Question) -> list[tuple[str, str | None]]:
    """How answer files may name a question."""
    question_id = benchmark.same_id(str(question.question_id))
    if not benchmark.answers_by_prompt:
        return [(question_id, None)]
    return [(question_id, prompt) for prompt in {question.prompt, _recorded(question)}]


def _recorded(question: Question) -> str:
    return question.prompt if question.recorded_prompt is None else question.recorded_prompt
