"""Names of a package that are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str], known: dict[str, Any]) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a package, which imports a public name when it is first asked for.

    Args:
        package: name of the package.
        homes: module of each public name, relative to the package.
        known: globals of the package, which get the names that were imported.

    Raises:
        AttributeError: by the returned function, for any other name.
    """

    def attribute(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = known[name] = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        return value

    return attribute
