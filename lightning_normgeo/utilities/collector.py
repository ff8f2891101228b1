"""Pauses of Python's garbage collector."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def without_collector(function: Function) -> Function:
    """Run a function without garbage collections; afterwards the collector is on again if it was before.

    Reading an autograd graph makes tens of thousands of tuples that live for milliseconds. Python takes their number
    for a reason to look through all objects of the process, which takes a tenth of a second and more with torch loaded.
    Without a collection in between, reference counts free them all.
    """

    @functools.wraps(function)
    def paused(*args: Any, **kwargs: Any) -> Any:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return paused  # type: ignore[return-value]
