"""Results as JSON files; light to import, so that the report comes at once."""

import json
from pathlib import Path


def write_json(path: Path, content: dict) -> None:
    """Write a result so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.rename(path)


def read_json(path: Path) -> dict | None:
    """Read a JSON file; None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
