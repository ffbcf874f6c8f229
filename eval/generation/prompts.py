"""Prompts of benchmarks, and where their pictures lie: each benchmark's judge looks in places of its own."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.names import is_below
from eval.benchmark_files import BenchmarkError, field_of, read_json_file, read_json_lines
from eval.inputs import choose

EXPECTED = (
    "a text file with a prompt a line, JSONL with `prompt`, GenEval's evaluation_metadata.jsonl, "
    "GenAI-Bench's genai_image.json or MJHQ-30K's meta_data.json"
)


@dataclass(frozen=True)
class Layout:
    """Where a judge expects pictures, and how many of each prompt."""

    name: str  # of the task it belongs to
    place: Callable[["Prompt", int], str]  # prompt and number of the picture -> path below the folder
    per_prompt: int  # as published
    most: int | None = None  # pictures of a prompt that the layout has places for


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file."""

    key: str  # unique in its file; the picture's name
    text: str
    category: str | None = None  # GenEval's tag, MJHQ-30K's category
    row: Mapping[str, Any] = field(default_factory=dict)  # as the file has it


def _plain(prompt: Prompt, sample: int) -> str:
    return f"{prompt.key}.png" if sample == 0 else f"{prompt.key}-{sample}.png"


PLAIN = Layout("drawing", _plain, 1)
GENEVAL = Layout("geneval", lambda prompt, sample: f"{prompt.key}/samples/{sample:04d}.png", 4)
GENAI_BENCH = Layout("genai_bench", lambda prompt, _: f"{prompt.key}.jpg", 1, most=1)
MJHQ = Layout("mjhq", lambda prompt, _: f"{prompt.category}/{prompt.key}.jpg", 1, most=1)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file, in its order."""

    source: Path
    layout: Layout
    prompts: list[Prompt]
    digest: str  # of all prompts of the file, whatever was drawn of them

    def draw(self, count: int | None, seed: int) -> "PromptSet":
        """`count` prompts drawn at random, under the names they have in the whole; all by default."""
        return replace(self, prompts=choose(self.prompts, count, seed))


def read_prompts(path: Path) -> PromptSet:
    """Read a file of prompts; its fields tell whose it is.

    Raises:
        BenchmarkError: it is missing, of another form, or has no prompts; the message names file and line.
    """
    if path.suffix == ".jsonl":
        layout, prompts = _read_jsonl(path)
    elif path.suffix == ".json":
        layout, prompts = _read_json(path)
    else:
        layout, prompts = PLAIN, _read_text(path)
    if not prompts:
        raise BenchmarkError(f"{path} has no prompts; expected {EXPECTED}")
    texts = [[prompt.key, prompt.text] for prompt in prompts]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return PromptSet(path, layout, prompts, digest)


def _read_text(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise BenchmarkError(f"no file {path}; expected {EXPECTED}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BenchmarkError(f"{path} is no text file (UTF-8); expected {EXPECTED}") from None
    texts = [line.strip() for line in lines if line.strip()]
    return [Prompt(f"{index:05d}", text) for index, text in enumerate(texts)]


def _read_jsonl(path: Path) -> tuple[Layout, list[Prompt]]:
    """GenEval's rows have tags; its folders are numbered by line, from 0."""
    rows = list(read_json_lines(path))
    geneval = bool(rows) and "tag" in rows[0][1]
    prompts = []
    for index, (number, row) in enumerate(rows):
        where = f"{path}, line {number}"
        tag = field_of(row, "tag", str, where) if geneval else None
        prompts.append(Prompt(f"{index:05d}", field_of(row, "prompt", str, where), tag, row))
    return (GENEVAL if geneval else PLAIN), prompts


def _read_json(path: Path) -> tuple[Layout, list[Prompt]]:
    content = read_json_file(path)
    if not isinstance(content, dict):
        raise BenchmarkError(f"{path} holds a {type(content).__name__}; expected {EXPECTED}")
    mjhq = any(isinstance(row, dict) and "category" in row for row in content.values())
    prompts = []
    for key, row in content.items():
        where = f"{path}, entry {key!r}"
        if not isinstance(row, dict):
            raise BenchmarkError(f"{where}: got {row!r:.40}; expected an object with `prompt`")
        text = field_of(row, "prompt", str, where)
        category = field_of(row, "category", str, where) if mjhq else None
        for name in (key, category or "-"):
            if len(Path(name).parts) != 1 or not is_below(name):
                raise BenchmarkError(f"{where}: {name!r} cannot name a file; expected a plain name")
        prompts.append(Prompt(key, text, category, row))
    return (MJHQ if mjhq else GENAI_BENCH), prompts
