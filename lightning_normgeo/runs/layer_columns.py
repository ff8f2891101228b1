"""Values by layer as columns: names are written once per process, and numbers with nine digits.

A training has the same quantities and layers at every measured step. Written out each time, their names take most of a
record; nine digits tell any two numbers of float32 apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lightning_normgeo.runs.record_lines import as_line

_DIGITS = 9


class LayerColumns:
    """Lines of a record with values by layer; the names come in a line of their own before they are first used."""

    def __init__(self) -> None:
        self._written: set[str] = set()

    def lines(self, layers: Mapping[str, Mapping[str, float]], step: int | None) -> list[tuple[str, str]]:
        """Return the kinds and the texts of the lines for one step.

        Args:
            layers: values by layer of several quantities.
            step: optimizer step.
        """
        names = list(dict.fromkeys(layer for values in layers.values() for layer in values))
        number = {name: k for k, name in enumerate(names)}
        places = {quantity: [number[layer] for layer in values] for quantity, values in layers.items()}
        columns = {"layers": names, "quantities": places}
        key = hashlib.blake2b(json.dumps(columns).encode(), digest_size=6).hexdigest()
        rows = [[_rounded(value) for value in values.values()] for values in layers.values()]
        found = [("column_values", as_line("column_values", {"step": step, "columns": key, "values": rows}))]
        if key not in self._written:
            self._written.add(key)
            found.insert(0, ("columns", as_line("columns", {"columns": key, **columns})))
        return found


def _rounded(value: Any) -> Any:
    """Return a number with nine digits; anything else as it is."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
