"""Valid lines of a record, with the names that earlier lines have given to their metrics and layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import warn_once
from lightning_normgeo.runs.records.record_lines import Columns, checked, wrong_fields
from lightning_normgeo.utilities.files import parsed, raw_lines

_BEGINNING = b'{"kind": "'
"""The beginning of every line, by which a line that was cut off can be told from other damage."""
_OF_LAYERS = (b'{"kind": "column_values"', b'{"kind": "layers"')
_OF_A_PROCESS = b'{"kind": "environment"'


def whole_lines(path: Path, skips_layers: Callable[[bytes], bool] = lambda line: False) -> Iterator[dict[str, Any]]:
    """Yield the valid lines of a record, and count the others in one warning.

    A line that was cut off because its process was killed, or that is being written right now, causes no warning.

    Args:
        path: Path of the record.
        skips_layers: Asked for each line with values by layer: whether to skip it unparsed. The last one of each
            process is not skipped.
    """
    left_out: Counter[str] = Counter()
    names = LineNames()
    count = 0
    cut_off = ""  # the reason counted for the previous line, if that may be incomplete instead of damaged
    for raw in _without_skipped(raw_lines(path), skips_layers):
        if raw.isspace():
            continue
        count += 1
        try:
            line = names.named(checked(parsed(raw)))
        except ValueError as error:
            left_out[str(error)] += 1
            cut_off = str(error) if _BEGINNING.startswith(raw.strip()[: len(_BEGINNING)]) else ""
            continue
        if cut_off and line["kind"] == "environment":  # a new process begins: the one before it was killed
            left_out[cut_off] -= 1
        cut_off = ""
        if line["kind"] not in ("keys", "columns"):
            yield line
    if cut_off and not raw.endswith(b"\n"):
        left_out[cut_off] -= 1
    _warn(path, count, +left_out)  # the sign removes reasons whose count is zero


def _without_skipped(lines: Iterable[bytes], skips_layers: Callable[[bytes], bool]) -> Iterator[bytes]:
    """Yield lines without those that may be skipped, but the last of these where a process ends."""
    held = b""
    for raw in lines:
        if raw.startswith(_OF_LAYERS):
            skipped = skips_layers(raw)
            held = raw if skipped else b""
            if skipped:
                continue
        elif held and raw.startswith(_OF_A_PROCESS):
            yield held
            held = b""
        yield raw
    if held:
        yield held


class LineNames:
    """Names of metrics, and of quantities and layers, by the keys that lines refer to them with."""

    def __init__(self) -> None:
        self._metrics: dict[str, list[str]] = {}
        self._columns: dict[str, Columns] = {}

    def named(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return a line with its names, after keeping those that it gives to others.

        Metrics get ``values`` by name; values by layer ``columns``, the quantities and layers of their ``rows``.

        Raises:
            ValueError: If the names are not known, or others than the values.
        """
        match line["kind"]:
            case "keys":
                self._metrics[line["keys"]] = line["names"]
            case "columns":
                self._columns[line["columns"]] = line["names"]
            case "key_values":
                return self._metrics_of(line)
            case "column_values":
                return self._layers_of(line)
            case "layers":
                values = line.pop("values")
                columns = [(key, list(by_layer)) for key, by_layer in values.items()]
                return {**line, "columns": columns, "rows": [list(by_layer.values()) for by_layer in values.values()]}
        return line

    def _metrics_of(self, line: dict[str, Any]) -> dict[str, Any]:
        names, row = self._metrics.get(line["keys"], []), line["row"]
        if len(names) != len(row) or not row:
            raise ValueError(wrong_fields(line["kind"]))
        return {
            "kind": "metrics",
            "time": line["time"],
            "step": line["step"],
            "values": dict(zip(names, row, strict=True)),
        }

    def _layers_of(self, line: dict[str, Any]) -> dict[str, Any]:
        columns, values = self._columns.get(line["columns"], []), line["values"]
        if len(columns) != len(values) or not values:
            raise ValueError(wrong_fields(line["kind"]))
        rows = [
            row if isinstance(row, list) else [row] * len(layers)  # one number for all layers
            for (_, layers), row in zip(columns, values, strict=True)
        ]
        if [len(layers) for _, layers in columns] != [len(row) for row in rows]:
            raise ValueError(wrong_fields(line["kind"]))
        return {"kind": "layers", "time": line["time"], "step": line["step"], "columns": columns, "rows": rows}


def _warn(path: Path, count: int, left_out: Counter[str]) -> None:
    """Warn of the skipped lines by reason; their content is not shown, as it may be anything."""
    if left_out:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        warn_once(f"{path}: {left_out.total()} of {count} lines are left out ({reasons}). The rest is read.")
