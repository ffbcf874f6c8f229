"""What the classes of a picture set are called, for zero-shot classification."""

import re
from pathlib import Path

from eval.visual_tokenizer.pictures import PictureSet

IMAGENET_CLASSES = 1000
WNID = re.compile(r"n\d{8}")
NAMES_FILE = "classnames.txt"
ADVICE = "a text file with a name a line, in the order of the classes"


def class_names(pictures: PictureSet, names: str | Path | None) -> list[str]:
    """The classes' names by label.

    Args:
        pictures: with labels.
        names: `imagenet` for open_clip's names of ImageNet-1K, or a text file with a name a line; by default
            `classnames.txt` beside the pictures if it is there, open_clip's where 1000 folders bear
            ImageNet's numbers, else the folders' names, with spaces for underscores.

    Raises:
        ValueError: there are no names, or not one for each class.
    """
    beside = pictures.source / NAMES_FILE
    if names is None and beside.is_file():
        names = beside
    folders = pictures.classes
    if names is None and folders is not None:
        numbered = [name for name in folders if WNID.fullmatch(name)]
        if not numbered:
            return [name.replace("_", " ") for name in folders]
        if len(numbered) != len(folders) or len(folders) != IMAGENET_CLASSES:
            raise ValueError(
                f"{pictures.source} has {len(numbered)} folders with ImageNet's numbers ({numbered[0]}); "
                f"expected all {IMAGENET_CLASSES}, whose names are known; for a part of them give {ADVICE}"
            )
        names = "imagenet"
    if names is None:
        raise ValueError(
            f"{pictures.source} has classes by number and no {NAMES_FILE}; give {ADVICE}, or 'imagenet'"
        )
    if str(names) == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES  # seconds

        found = list(IMAGENET_CLASSNAMES)
    else:
        found = _read_names(Path(names))
    classes = len(folders) if folders is not None else 1 + max(one.label or 0 for one in pictures.pictures)
    if len(found) < classes or (folders is not None and len(found) != classes):
        raise ValueError(f"{names} has {len(found)} class names; {pictures.source} has {classes} classes")
    return found


def _read_names(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"no class names at {path}; expected {ADVICE}, or 'imagenet'")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if "" in names:
        raise ValueError(f"{path}, line {names.index('') + 1}: no class name; expected {ADVICE}")
    return names
