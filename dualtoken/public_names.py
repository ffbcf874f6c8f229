"""Names of a package that are imported on first use, so that importing the package itself costs nothing."""

import importlib
from collections.abc import Callable
from typing import Any


def imported_on_first_use(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package.

    Args:
        package: its name.
        homes: public name -> module below the package that defines it.
    """

    def get(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
