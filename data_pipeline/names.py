"""Names that come with data: which of them stay in the folder they are given for."""

from pathlib import PurePosixPath


def is_below(name: str) -> bool:
    """Whether a relative name stays below the folder it is joined to; links there are the owner's own."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
