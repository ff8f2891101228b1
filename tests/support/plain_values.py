"""Results as plain values for a JSON document, with what was warned and the error if there was one."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_normgeo.errors import MeasurementWarning


def plain(value: Any) -> Any:
    """Return a result as plain values."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if is_dataclass(value):
        return plain(vars(value))
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items() if not callable(entry)}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if isinstance(value, int | float | str | None) else str(value)


def tried(measure: Callable[[Any], Any], argument: Any) -> dict[str, Any]:
    """Return the numbers, what was warned, and the error if there was one."""
    found: dict[str, Any] = {"error": "", "numbers": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found["numbers"] = measure(argument)
        except Exception:
            found["error"] = traceback.format_exc()
    return found | {"warned": [str(one.message) for one in caught if issubclass(one.category, MeasurementWarning)]}
