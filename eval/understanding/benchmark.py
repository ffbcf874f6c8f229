"""What a benchmark of questions about pictures is: pure functions that read, ask, parse and score.

Each benchmark is a module of this room with one `Benchmark`, named in `registry.py`; asking models
(`answering.py`) and keeping answers (`answers.py`) are shared.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.benchmark_files import BenchmarkError as BenchmarkError

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    key: str  # unique in its benchmark
    question_id: str | int  # as the answer files bear it; MME's two questions of a picture share it
    prompt: str  # what is asked, suffix included, without the image token
    image: Path | bytes | None  # a picture file, or its bytes; None where only answers are scored
    category: str = "default"
    options: tuple[str, ...] = ()  # possible answers as they would be written: letters; Yes, No
    truth: Any = None  # what the benchmark's scoring needs; None where the split has no public answers
    group: str | None = None  # of those scored together: MME's two of a picture, MMBench's rotations
    optional: bool = False  # scored where somebody answered it, never asked: SEED-Bench's videos
    recorded_prompt: str | None = None  # `prompt` of LLaVA's answer files, where it differs
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of LLaVA's answer row


@dataclass(frozen=True)
class Scores:
    """What the official scoring gives; shares in percent where the benchmark reports percent."""

    value: float | None  # the headline figure
    figures: Mapping[str, float | None]
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # per category, type, ...
    per_question: Mapping[str, float] = field(default_factory=dict)  # key -> score in [0, 1]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark; all functions are pure but for reading `read`'s and writing `submit`'s files."""

    name: str  # as `dualtoken evaluate` takes it
    title: str
    headline: str  # name of the figure in the table
    unit: str
    needs: str  # the files `read` looks for, for help and errors
    read: Callable[[Path, bool], list[Question]]
    """The questions in the folder of the authors' files; with False without pictures, to score answers."""
    score: Callable[[Sequence[Question], Mapping[str, str]], Scores]
    """Scores of answers by key; a question without an answer counts as the official scorer counts it."""
    submit: Callable[[Sequence[Question], Mapping[str, str], Path], list[Path]] | None = None
    """Write the files that the benchmark's server or judge takes into a folder."""
    max_new_tokens: int = 128
    chance: Callable[[Sequence[Question]], float] | None = None
    """What guessing gives, in the unit of the headline; None where there is no such thing."""
    share: bool = False  # the headline is a share of the questions, or of their groups, not such as F1
    answers_by_prompt: bool = False  # told apart by (question_id, prompt): MME, TextVQA
    same_id: Callable[[str], str] = str
    """What two spellings of a question's id have in common, where files spell it differently."""
    read_results: Callable[[Path], Iterable[tuple[str, str, str | None, str]]] | None = None
    """Rows of (where, question id, prompt, text) of results in the authors' own form, not JSONL."""
