"""Values of measured steps as columns: names are written once per process, and values by layer with nine digits.

A training has the same metrics, quantities and layers at every measured step. Written out each time, their names take
most of a record; nine digits tell any two numbers of float32 apart. A quantity that all layers share, such as the
equilibrium angle of one learning rate, is one number in place of a row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
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


class _WrittenNames:
    """Keys of the names in a record.

    Only the last names are kept, since a network whose layers are skipped at random has others at every step.
    """

    def __init__(self) -> None:
        self.key = ""
        self._last: Any = None
        self._written: set[str] = set()

    def begin(self, names: Any, described: Callable[[], Any]) -> Any:
        """Set the key to that of names; return their description if it is not in the record yet, else None.

        Args:
            names: to compare with the last ones.
            described: returns the description, of which the key is made.
        """
        if names == self._last:
            return None
        description = described()
        self._last, self.key = names, _digest(description)
        if self.key in self._written:
            return None
        self._written.add(self.key)
        return description


class MetricColumns:
    """Lines of a record with metrics; names of many come in a line of their own before they are first used."""

    def __init__(self) -> None:
        self._names = _WrittenNames()

    def lines(self, metrics: Mapping[str, float], step: int | None) -> Lines:
        """Return the lines for one step.

        Args:
            metrics: numbers by key.
            step: optimizer step.
        """
        if len(metrics) < _MANY:
            return [("metrics", as_line("metrics", {"step": step, "values": metrics}))]
        names, found = tuple(metrics), []
        if self._names.begin(names, lambda: names) is not None:
            found.append(("keys", as_line("keys", {"keys": self._names.key, "names": names})))
        fields = {"step": step, "keys": self._names.key, "values": list(metrics.values())}
        return [*found, ("key_values", _with_short_numbers(as_line("key_values", fields)))]


class LayerColumns:
    """Lines of a record with values by layer; the names come in a line of their own before they are first used."""

    def __init__(self) -> None:
        self._names = _WrittenNames()

    def lines(self, layers: Mapping[str, Mapping[str, float]], step: int | None) -> Lines:
        """Return the lines for one step.

        Args:
            layers: values by layer of several quantities.
            step: optimizer step.
        """
        columns = tuple((quantity, tuple(values)) for quantity, values in layers.items())
        found = []
        names = self._names.begin(columns, lambda: _names_of(columns))
        if names is not None:
            found.append(("columns", as_line("columns", {"columns": self._names.key, **names})))
        rows = [_row([_rounded(value) for value in values.values()]) for values in layers.values()]
        fields = {"step": step, "columns": self._names.key, "values": rows}
        return [*found, ("column_values", _with_short_numbers(as_line("column_values", fields)))]


def _names_of(columns: Columns) -> dict[str, Any]:
    """Return the names of columns: all layers once, and the numbers of those of each quantity."""
    layers = list(dict.fromkeys(layer for _, own in columns for layer in own))
    number = {layer: k for k, layer in enumerate(layers)}
    return {"layers": layers, "quantities": {quantity: [number[layer] for layer in own] for quantity, own in columns}}


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
