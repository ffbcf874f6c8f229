"""Reading the authors' files: JSON, JSON lines and tables, with errors that name file and line."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.names import is_below

csv.field_size_limit(2**31 - 1)  # a picture in base64 is one field


class BenchmarkError(ValueError):
    """Files or answers that do not fit a benchmark; the message names file and line, and what to do."""


def find_file(folder: Path, *patterns: str, what: str) -> Path:
    """The one file of a folder, or of a folder below it, that fits the first pattern any file fits.

    Raises:
        BenchmarkError: there is none, or several fit.
    """
    if not folder.is_dir():
        raise BenchmarkError(f"no folder {folder}; expected the folder with {what}")
    for pattern in patterns:
        found = sorted(path for path in folder.rglob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in found[:4])
            raise BenchmarkError(
                f"{folder} has {len(found)} files {pattern} ({names}); keep one split of {what}"
            )
        if found:
            return found[0]
    raise BenchmarkError(f"{folder} has no {' or '.join(patterns)}; expected {what}")


def read_json_file(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        BenchmarkError: it is missing, not text or no JSON; the message has the line.
    """
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise BenchmarkError(
            f"{path}, line {error.lineno}: no JSON ({error.msg}); is the file whole?"
        ) from None


def read_json_lines(path: Path, torn: bool = False) -> Iterator[tuple[int, dict]]:
    """Line number and object of each line of a JSONL file; empty lines are passed over.

    Args:
        path: of the file.
        torn: whether to pass over lines that are no JSON, too.

    Raises:
        BenchmarkError: the file is missing, or a line is no JSON object.
    """
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if torn:
                continue
            raise BenchmarkError(
                f"{path}, line {number}: no JSON ({error.msg}); expected JSONL, an object a line"
            ) from None
        if not isinstance(row, dict):
            raise BenchmarkError(f"{path}, line {number}: got {line[:40]!r}; expected a JSON object")
        yield number, row


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of each row of a tab-separated table with a head.

    Raises:
        BenchmarkError: the file is missing, lacks one of `columns`, or a row has too few or many fields.
    """
    _text(path, only_check=True)
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t")
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise BenchmarkError(
                f"{path} has no column {missing[0]!r}; its head is {list(reader.fieldnames or ())}"
            )
        for row in reader:
            if None in row or None in row.values():
                count = len(reader.fieldnames or ())
                raise BenchmarkError(f"{path}, line {reader.line_num}: the row does not have {count} fields")
            yield reader.line_num, row


def field_of(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a row, checked.

    Raises:
        BenchmarkError: the field is missing or of another type; `where` names file and line.
    """
    if name not in row:
        raise BenchmarkError(f"{where}: no field {name!r}; got {sorted(row)}")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        names = kind.__name__ if isinstance(kind, type) else " or ".join(one.__name__ for one in kind)
        raise BenchmarkError(f"{where}: field {name!r} is {value!r:.60}; expected {names}")
    return value


def find_image(folders: Sequence[Path], name: str, where: str) -> Path:
    """The picture `name` in the first of the folders that has it.

    Raises:
        BenchmarkError: none has it, or the name leads out of the folder.
    """
    for folder in folders:
        path = folder / name
        if is_below(name) and path.is_file():
            return path
    looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise BenchmarkError(f"{where}: no picture {name} in {looked}; put the benchmark's pictures there")


def find_images(folders: Sequence[Path], names: Sequence[tuple[str, str]]) -> list[Path]:
    """The pictures of many questions at once; each folder is listed once, which matters where disks are far.

    Args:
        folders: looked through in this order.
        names: for each picture what asks for it, file and line, and its name.

    Raises:
        BenchmarkError: some are missing; the message counts them and names the first.
    """
    listed = [(folder, set(os.listdir(folder))) for folder in dict.fromkeys(folders) if folder.is_dir()]
    found: list[Path] = []
    missing = []
    for where, name in names:
        there = next((folder / name for folder, inside in listed if name in inside), None)
        if there is None and "/" in name and is_below(name):
            there = next((folder / name for folder, _ in listed if (folder / name).is_file()), None)
        if there is None:
            missing.append((where, name))
        else:
            found.append(there)
    if missing:
        where, name = missing[0]
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
        raise BenchmarkError(f"{where}: no picture {name}{others} in {looked}; put the pictures there")
    return found


def _text(path: Path, only_check: bool = False) -> str:
    if not path.is_file():
        raise BenchmarkError(f"no file {path}")
    try:
        if only_check:
            with open(path, encoding="utf-8-sig") as file:
                file.read(4096)
            return ""
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BenchmarkError(f"{path} is no text file (UTF-8)") from None
