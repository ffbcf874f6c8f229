"""What decides a folder's content, written down once: whoever goes on with it has to agree."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.pretokenize.claims import link_once
from data_pipeline.shards.code_shards import temporary_name, write_atomically
from eval.benchmark_files import BenchmarkError, read_json_file

SETTINGS = "settings.json"


def agree(folder: Path, settings: Mapping[str, Any], what: str, not_deciding: Collection[str] = ()) -> None:
    """Write a folder's `settings.json`, or check that what lies there came by the same.

    Args:
        folder: made where it is missing; ranks need no connection, the first one's settings stand.
        settings: what decides the content, as JSON takes it.
        what: the content, such as "answers".
        not_deciding: names of settings that may differ.

    Raises:
        BenchmarkError: a setting differs; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    own = temporary_name(path)
    write_atomically(own, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    try:
        link_once(own, path)
    finally:
        own.unlink()
    found = read_json_file(path)
    for name in [*settings, *(name for name in found if name not in settings)]:
        if name not in not_deciding and found.get(name) != settings.get(name):
            raise BenchmarkError(
                f"{folder} holds {what} with {name} {found.get(name)}, not {settings.get(name)}; "
                "name another output folder, or remove this one to start anew"
            )
