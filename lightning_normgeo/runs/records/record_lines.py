"""Lines of a record: writing them, and checking the fields of each kind of line when it is read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

_NUMBER = (int, float)
_PLAIN = frozenset({float})
"""Types of the values of lines that need no further check."""
_NOT_FINITE = ("nan", "inf", "-inf")
"""Texts for the numbers that JSON does not have."""
_LAST_YEAR = 2.5e11
"""Seconds since 1970, about the year 9999: dates cannot express later times."""
Columns = list[tuple[str, list[str]]]
"""Quantities of columns, each with its layers."""
ROBUSTNESS = "robustness"
"""The name of an evaluation's results, also in files and W&B; ``robustness_{name}`` for an evaluation with a name."""
VALIDATION = "validation"
"""The data of an evaluation in ``trainer.validate``; others are on test data."""


def as_line(kind: str, fields: Mapping[str, Any]) -> str:
    """Return a line of a record as JSON text, with the current time."""
    known = {"kind": kind, "time": round(time.time(), 3), **plain_json(fields)}
    return json.dumps(known, allow_nan=False, separators=(",", ": "))


def plain_json(value: Any) -> Any:
    """Return a value in the types of JSON; numbers that are not finite and all other objects become their text."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def checked(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line with the fields of its kind, checked and converted.

    Args:
        line: Line of a record, as parsed from JSON.

    Raises:
        ValueError: If a field is missing or wrong; the message is a short reason that lines can be counted by.
    """
    kind = line.get("kind")
    if not isinstance(kind, str):
        raise ValueError("without a kind")
    if kind not in _KINDS:
        raise ValueError("of an unknown kind")
    try:
        moment = _finite(line.get("time", 0.0))
        if not 0 <= moment < _LAST_YEAR:
            raise ValueError(moment)
        return {"kind": kind, "time": moment, **_KINDS[kind](line)}
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(wrong_fields(kind)) from error


def wrong_fields(kind: str) -> str:
    """Return the reason for which a line is left out, by which such lines are counted."""
    return f"of kind {kind} with wrong fields"


def _metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": _step(line), "values": _numbers(line["values"])}


def _keys(line: Mapping[str, Any]) -> dict[str, Any]:
    names = [_text(name) for name in _list(line["names"])]
    if len(set(names)) < len(names):
        raise ValueError(names)
    return {"keys": _text(line["keys"]), "names": names}


def _key_values(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": _step(line), "keys": _text(line["keys"]), "row": _row(_list(line["values"]))}


def _layers(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": _step(line), "values": {key: _numbers(by_layer) for key, by_layer in _mapping(line).items()}}


def _columns(line: Mapping[str, Any]) -> dict[str, Any]:
    layers = [_text(name) for name in _list(line["layers"])]
    places = line["quantities"]
    if not isinstance(places, dict) or any(type(k) is not int or k < 0 for one in places.values() for k in one):
        raise TypeError(places)
    return {
        "columns": _text(line["columns"]),
        "names": [(key, [layers[k] for k in one]) for key, one in places.items()],
    }


def _column_values(line: Mapping[str, Any]) -> dict[str, Any]:
    rows = [_row(row) if isinstance(row, list) else _number(row) for row in _list(line["values"])]
    return {"step": _step(line), "columns": _text(line["columns"]), "values": rows}


def _settings(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"values": _mapping(line)}


def _environment(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"values": {key: str(value) for key, value in _mapping(line).items()}}


def _results(line: Mapping[str, Any]) -> dict[str, Any]:
    name, values = _text(line["name"]), _mapping(line)
    if name.partition("_")[0] == ROBUSTNESS:
        _check_evaluation(values)
        for loader in _optional(values, "loaders", dict).values():
            _check_evaluation(loader)
    return {"name": name, "values": values}


def _check_evaluation(values: Any) -> None:
    for row in _optional(values, "results", list):
        _check_row(row)
    settings = _optional(values, "settings", dict)
    for name in ("threat", "attacks", "inputs"):
        _optional(settings, name, dict)
    for strength in settings.get("attacks", {}).values():
        for name in ("eps", "std"):
            _optional(strength, name, _NUMBER)
    for reason in (*_optional(values, "warnings", list), *_optional(values, "not_evaluated", dict).values()):
        _text(reason)
    _optional(values, "weights", dict)
    _optional(values, "data", str)


def _check_row(row: Any) -> None:
    """Check the counts of an attack; its accuracy may be null if it was evaluated on no sample."""
    _text(row["attack"])
    n = _finite(row["n"])
    if not 0 <= n < 2**53 or not 0 <= _optional(row, "correct", int, 0) <= n:
        raise ValueError(row)
    if n:
        _finite(row["accuracy"])
        _finite(row["accuracy_drop"])
        _finite(row.get("ci_low", 0.0))
        _finite(row.get("ci_high", 0.0))
    else:
        _known(row["accuracy"])
        _known(row["accuracy_drop"])
        _known(row.get("ci_low"))
        _known(row.get("ci_high"))
    for name in ("eps", "std", "changed"):
        _optional(row, name, _NUMBER)
    for name in ("loss", "linf", "l2"):
        _known(row.get(name))
    for label, (right, of) in _optional(row, "by_class", dict).items():
        if not 0 <= _finite(right) <= _finite(of) or str(int(label)) != str(label):
            raise ValueError(row)


def _known(value: Any) -> float | None:
    """Return a number, or None for null."""
    return None if value is None else _number(value)


def _optional(values: Any, name: str, kind: Any, default: Any = None) -> Any:
    """Return an entry that may be missing, after a check of its type; numbers may be null."""
    if default is None and isinstance(kind, type):
        default = kind()  # an empty list or dictionary
    found = values.get(name, default)
    may_be_null = kind == _NUMBER
    if not isinstance(found, kind) and not (found is None and may_be_null):
        raise TypeError(found)
    return found


def _images(line: Mapping[str, Any]) -> dict[str, Any]:
    files = [_text(file) for file in _list(line["files"])]
    captions = [_text(caption) for caption in _list(line.get("captions") or [""] * len(files))]
    if len(captions) != len(files):
        raise ValueError(captions)
    return {"key": _text(line["key"]), "images": list(zip(files, captions, strict=True))}


def _outage(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"lost": int(_finite(line["values"]["lost"]))}


def _end(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": _text(line.get("status", "failed"))}


_KINDS = {
    "metrics": _metrics,
    "keys": _keys,
    "key_values": _key_values,
    "layers": _layers,
    "columns": _columns,
    "column_values": _column_values,
    "settings": _settings,
    "environment": _environment,
    "results": _results,
    "observation": _settings,
    "images": _images,
    "outage": _outage,
    "end": _end,
}


def _step(line: Mapping[str, Any]) -> int:
    step = line.get("step")
    whole = 0 if step is None else int(_finite(step))
    if abs(whole) >= 2**53:  # a float64, as figures use, could not tell it from its neighbor
        raise ValueError(whole)
    return whole


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        raise TypeError(values)
    if _PLAIN.issuperset(map(type, values.values())):
        return values
    return {key: _number(value) for key, value in values.items()}


def _row(values: list[Any]) -> list[float]:
    return values if _PLAIN.issuperset(map(type, values)) else [_number(value) for value in values]


def _number(value: Any) -> float:
    if isinstance(value, _NUMBER) or value in _NOT_FINITE:
        return float(value)
    raise TypeError(value)


def _finite(value: Any) -> float:
    number = _number(value)
    if not math.isfinite(number):
        raise ValueError(number)
    return number


def _mapping(line: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(line["values"], dict):
        raise TypeError(line["values"])
    return line["values"]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value
