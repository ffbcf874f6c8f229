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


@dataclass(frozen=True)
class Layout:
    """Where a judge expects pictures, and how many of each prompt."""

    name: str  # of the task it belongs to
    place: Callable[["Prompt", int], str]  # prompt and number of the picture -> path below the folder
    per_prompt: int  # as published
    needs: str  # the file of prompts, for help and errors
    most: int | None = None  # pictures of a prompt that the layout has places for
    suffix: str | None = None  # of the file of prompts; None for any


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file."""

    key: str  # unique in its file; the picture's name
    text: str
    category: str | None = None  # GenEval's tag, MJHQ-30K's category
    row: Mapping[str, Any] = field(default_factory=dict)  # as the file has it


def _plain(prompt: Prompt, sample: int) -> str:
    return f"{prompt.key}.png" if sample == 0 else f"{prompt.key}-{sample}.png"


PLAIN = Layout("drawing", _plain, 1, "a text file with a prompt a line, or JSONL with `prompt`")
GENEVAL = Layout(
    "geneval",
    lambda prompt, sample: f"{prompt.key}/samples/{sample:04d}.png",
    4,
    "GenEval's evaluation_metadata.jsonl",
    suffix=".jsonl",
)
GENAI_BENCH = Layout(
    "genai_bench",
    lambda prompt, _: f"{prompt.key}.jpg",
    1,
    "GenAI-Bench's genai_image.json, with genai_skills.json beside it",
    most=1,
    suffix=".json",
)
MJHQ = Layout(
    "mjhq",
    lambda prompt, _: f"{prompt.category}/{prompt.key}.jpg",
    1,
    "MJHQ-30K's meta_data.json, with mjhq30k_imgs/ beside it",
    most=1,
    suffix=".json",
)


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


def read_prompts(path: Path, layout: Layout) -> PromptSet:
    """Read a file of prompts, of the benchmark that a layout belongs to; for `PLAIN` anybody's.

    Raises:
        BenchmarkError: it is missing, of another form, or has no prompts; the message names file and line.
    """
    if layout.suffix not in (None, path.suffix):
        raise BenchmarkError(f"{path} is no {layout.suffix} file; {layout.name} needs {layout.needs}")
    readers = {".jsonl": _read_jsonl, ".json": _read_json}
    prompts = readers.get(path.suffix, _read_text)(path, layout)
    if not prompts:
        raise BenchmarkError(f"{path} has no prompts; {layout.name} needs {layout.needs}")
    texts = [[prompt.key, prompt.text] for prompt in prompts]
    return PromptSet(path, layout, prompts, hashlib.sha256(json.dumps(texts).encode()).hexdigest())


def _read_text(path: Path, layout: Layout) -> list[Prompt]:
    if not path.is_file():
        raise BenchmarkError(f"no file {path}; {layout.name} needs {layout.needs}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise BenchmarkError(f"{path} is no text file (UTF-8); {layout.name} needs {layout.needs}") from None
    texts = [line.strip() for line in lines if line.strip()]
    return [Prompt(f"{index:05d}", text) for index, text in enumerate(texts)]


def _read_jsonl(path: Path, layout: Layout) -> list[Prompt]:
    """Numbered by line from 0, as GenEval's folders are."""
    prompts = []
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        tag = field_of(row, "tag", str, where) if layout is GENEVAL else None
        prompts.append(Prompt(f"{len(prompts):05d}", field_of(row, "prompt", str, where), tag, row))
    return prompts


def _read_json(path: Path, layout: Layout) -> list[Prompt]:
    content = read_json_file(path)
    if not isinstance(content, dict):
        raise BenchmarkError(
            f"{path} holds a {type(content).__name__}, no object; {layout.name} needs {layout.needs}"
        )
    prompts = []
    for key in content:
        where = f"{path}, entry {key!r}"
        row = field_of(content, key, dict, where)
        category = field_of(row, "category", str, where) if layout is MJHQ else None
        for name in (key, category or "-"):
            if len(Path(name).parts) != 1 or not is_below(name) or "\0" in name:
                raise BenchmarkError(f"{where}: {name!r} cannot name a file; expected a plain name")
        prompts.append(Prompt(key, field_of(row, "prompt", str, where), category, row))
    return prompts
