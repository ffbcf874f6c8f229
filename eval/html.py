"""Pages of one file: their templates, and pictures inside them. The home of jinja2."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.names import is_below

if TYPE_CHECKING:
    from jinja2 import Environment

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def template_environment() -> Environment:
    """Where the templates of this folder are rendered; ImportError without jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'dualtoken[eval]'") from error
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def data_uri(path: Path) -> str:
    """A picture file as text for a page.

    Raises:
        ValueError: its name does not end as a picture's.
    """
    kind = MEDIA_TYPES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: not the name of a picture; expected {', '.join(MEDIA_TYPES)}")
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode("ascii")


class PictureFolder:
    """Gives a page its pictures: paths as the results name them, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> str:
        """The picture as a data URI; ValueError for a name that leads out of the folder."""
        if not is_below(name):
            raise ValueError(f"{self.folder}: a result names the picture {name!r}; measure the run again")
        return data_uri(self.folder / name)


def write_html(path: Path, text: str) -> None:
    """Write a page so that a reader never sees half of it."""
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)
