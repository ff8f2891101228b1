"""Values of measured steps as columns: names are written once per process, and values by layer with nine digits.

A training has the same metrics, quantities and layers at every measured step. Written out each time, their names take
most of a record; nine digits tell any two numbers of float32 apart. A quantity that all layers share, such as the
equilibrium angle of one learning rate, is one number in place of a row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from lightning_normgeo.runs.records.record_lines import as_line

_DIGITS = 9
_MANY = 16
"""Number of metrics from which on their names come in a line of their own; lines of fewer can be read by themselves."""
_FEW_ZEROS = re.compile(r"(?<![\d.])0\.000(\d+)")
"""Numbers from 1e-4 to 1e-3, which are shorter with an exponent: 0.000123 is 123e-6."""
Columns = tuple[tuple[str, tuple[str, ...]], ...]
"""Quantities, each with its layers."""
Lines = list[tuple[str, str]]
"""Kinds and texts of lines."""


class MetricColumns:
    """Lines of a record with metrics; names of many come in a line of their own before they are first used."""

    def __init__(self) -> None:
        self._keys: dict[tuple[str, ...], str] = {}

    def lines(self, metrics: Mapping[str, float], step: int | None) -> Lines:
        """Return the lines for one step.

        Args:
            metrics: numbers by key.
            step: optimizer step.
        """
        if len(metrics) < _MANY:
            return [("metrics", as_line("metrics", {"step": step, "values": metrics}))]
        names, found = tuple(metrics), []
        if names not in self._keys:
            self._keys[names] = _digest(names)
            found.append(("keys", as_line("keys", {"keys": self._keys[names], "names": names})))
        fields = {"step": step, "keys": self._keys[names], "values": list(metrics.values())}
        return [*found, ("key_values", _with_short_numbers(as_line("key_values", fields)))]


class LayerColumns:
    """Lines of a record with values by layer; the names come in a line of their own before they are first used."""

    def __init__(self) -> None:
        self._keys: dict[Columns, str] = {}

    def lines(self, layers: Mapping[str, Mapping[str, float]], step: int | None) -> Lines:
        """Return the lines for one step.

        Args:
            layers: values by layer of several quantities.
            step: optimizer step.
        """
        columns = tuple((quantity, tuple(values)) for quantity, values in layers.items())
        found = []
        if columns not in self._keys:
            key, names = _names_of(columns)
            self._keys[columns] = key
            found.append(("columns", as_line("columns", {"columns": key, **names})))
        rows = [_row([_rounded(value) for value in values.values()]) for values in layers.values()]
        fields = {"step": step, "columns": self._keys[columns], "values": rows}
        return [*found, ("column_values", _with_short_numbers(as_line("column_values", fields)))]


def _names_of(columns: Columns) -> tuple[str, dict[str, Any]]:
    """Return the key of columns, and their names: all layers once, and the numbers of those of each quantity."""
    layers = list(dict.fromkeys(layer for _, own in columns for layer in own))
    number = {layer: k for k, layer in enumerate(layers)}
    names = {"layers": layers, "quantities": {quantity: [number[layer] for layer in own] for quantity, own in columns}}
    return _digest(names), names


def _digest(names: Any) -> str:
    """Return a short key of names."""
    return hashlib.blake2b(json.dumps(names).encode(), digest_size=6).hexdigest()


def _rounded(value: Any) -> Any:
    """Return a number with nine digits; anything else as it is."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _row(values: list[Any]) -> Any:
    """Return the numbers of a quantity; a single one if all of several layers have the same, to the sign of zero."""
    equal = len(values) > 1 and len(set(values)) == 1 == len(set(map(str, values)))
    return values[0] if equal else values


def _with_short_numbers(line: str) -> str:
    """Return a line of numbers with the same numbers in fewer characters, such as 1e-7 for 1e-07."""
    return _FEW_ZEROS.sub(lambda found: f"{found[1]}e-{3 + len(found[1])}", line.replace("e-0", "e-"))
