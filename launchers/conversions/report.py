"""What a conversion did with every weight: a few lines for the terminal, all names in `conversion.json`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipeline.whole_folder import whole_folder
from launchers.errors import UserError

FILE = "conversion.json"


@dataclass
class Report:
    """What became of the weights of a conversion."""

    conversion: str
    sources: dict[str, str]
    renamed: dict[str, str] = field(default_factory=dict)
    """Name there -> name in the result, of weights that were taken over."""
    new: list[str] = field(default_factory=list)
    """Names in the result that no source has."""
    dropped: list[str] = field(default_factory=list)
    """Names there that the result does not have."""
    notes: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Say it in a few lines."""
        moved = [(old, new) for old, new in self.renamed.items() if old != new]
        if moved:
            old, new = moved[0]
            yield f"renamed: {len(moved)} weights, the first {old} -> {new}"
        if kept := len(self.renamed) - len(moved):
            yield f"as they were: {kept} weights"
        for what, names in (("NEW", self.new), ("dropped", self.dropped)):
            if names:
                yield f"{what}: {len(names)} weights ({by_part(names)})"
        yield from self.notes


def by_part(names: Sequence[str]) -> str:
    """Count names by what stands before their first dot."""
    return ", ".join(f"{part} {count}" for part, count in Counter(n.split(".")[0] for n in names).items())


def require_new(output: Path) -> None:
    """Raise UserError if there is something at `output` that would be overwritten."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists: choose another --out or remove it")


@contextmanager
def new_folder(output: Path, report: Report) -> Iterator[Path]:
    """Give a folder to write the result into; it is at `output`, with its report, when the block has ended.

    Raises:
        UserError: there is something at `output`.
    """
    require_new(output)
    with whole_folder(output) as folder:
        yield folder
        text = json.dumps(asdict(report), indent=1, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def written(output: Path, more: str = "") -> str:
    """The last line of a conversion."""
    return f"written: {output}{more}; every name is in {FILE} there"
