"""The lines of a record: how they are written, and what each kind of them has to hold when it is read."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import warn_once
from lightning_normgeo.utilities.files import parsed, raw_lines

_NUMBER = (int, float)
_NOT_FINITE = ("nan", "inf", "-inf")
"""How numbers are written that JSON does not have."""
_LAST_YEAR = 2.5e11
"""Seconds since 1970, about the year 9999: later times have no date."""
_BEGINNING = b'{"kind": "'
ROBUSTNESS = "robustness"
"""The results of an evaluation; those of one with a name are called ``robustness_{name}``, also in files and W&B."""


def as_line(kind: str, fields: Mapping[str, Any]) -> str:
    """A line of a record, with the time."""
    return json.dumps({"kind": kind, "time": round(time.time(), 3), **plain(fields)}, allow_nan=False)


def plain(value: Any) -> Any:
    """``value`` as what JSON has; anything else becomes its text, numbers that are not finite among it."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a record that hold what their kind has to; the others are counted in one warning.

    No warning is due to the half line that a killed process leaves, or one that is just being written.
    """
    left_out: Counter[str] = Counter()
    count, half = 0, ""
    for raw in raw_lines(path):
        if raw.isspace():
            continue
        count += 1
        try:
            line = checked(parsed(raw))
        except ValueError as error:
            left_out[str(error)] += 1
            half = str(error) if _BEGINNING.startswith(raw.strip()[: len(_BEGINNING)]) else ""
            continue
        if half and line["kind"] == "environment":  # another process went on
            left_out[half] -= 1
        half = ""
        yield line
    if half and not raw.endswith(b"\n"):
        left_out[half] -= 1
    _warn(path, count, +left_out)


def checked(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line with its numbers as numbers.

    Raises:
        ValueError: saying in a few words what is wrong with it.
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
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"of kind {kind} with wrong fields") from error


def _metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": _step(line), "values": _numbers(line["values"])}


def _layers(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": _step(line), "values": {key: _numbers(by_layer) for key, by_layer in _mapping(line).items()}}


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


def _check_row(row: Any) -> None:
    """Check the counts of an attack; of no sample there is no accuracy."""
    _text(row["attack"])
    n = _finite(row["n"])
    if not 0 <= n < 2**53 or not 0 <= _optional(row, "correct", int, 0) <= n:
        raise ValueError(row)
    for name in ("accuracy", "accuracy_drop"):
        _finite(row[name]) if n else _known(row[name])
    for name in ("ci_low", "ci_high"):
        _finite(row.get(name, 0.0)) if n else _known(row.get(name))
    for name in ("eps", "std"):
        _optional(row, name, _NUMBER)
    for name in ("loss", "linf", "l2"):
        _known(row.get(name))


def _known(value: Any) -> float | None:
    """A number, or None where there is none."""
    return None if value is None else _number(value)


def _optional(values: Any, name: str, kind: Any, default: Any = None) -> Any:
    """An entry that may be missing, but is nothing else than of a kind; a number may be null."""
    found = values.get(name, kind() if default is None and isinstance(kind, type) else default)
    if not isinstance(found, kind) and not (found is None and kind == _NUMBER):
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
    "layers": _layers,
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
    if abs(whole) >= 2**53:  # no figure could tell it from its neighbor
        raise ValueError(whole)
    return whole


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        raise TypeError(values)
    return {key: _number(value) for key, value in values.items()}


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


def _warn(path: Path, count: int, left_out: Counter[str]) -> None:
    """Say what was left out of a record; nothing of what it holds."""
    if left_out:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        warn_once(f"{path}: {left_out.total()} of {count} lines are left out ({reasons}). The rest is read.")
