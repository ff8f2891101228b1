"""Records with all texts made safe to show, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.records.record_curves import LayerPoints
from lightning_normgeo.utilities.plain_text import plain


def plain_record(record: Record) -> Record:
    """Return a record with its texts made :func:`plain`, except names of files and of settings, which are looked up.

    Names of layers and metrics, captions, attacks, reasons and versions go into figures, tables, text files and
    terminals. A name with a character that ends a line of JavaScript would break every figure that has it.
    """
    return replace(
        record,
        metrics=_keyed(record.metrics),
        layers={key: _layers(points) for key, points in _keyed(record.layers).items()},
        environment=_plain(record.environment),
        results=_plain(record.results),
        observations=_plain(record.observations),
        images={
            plain(key): [(file, plain(caption)) for file, caption in pictures]
            for key, pictures in record.images.items()
        },
    )


def _layers(points: Sequence[tuple[int, dict[str, float]]]) -> Sequence[tuple[int, dict[str, float]]]:
    names = points.layers if isinstance(points, LayerPoints) else {name for _, values in points for name in values}
    return points if all(map(str.isprintable, names)) else [(step, _keyed(values)) for step, values in points]


def _keyed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {plain(key): value for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return plain(value) if isinstance(value, str) else value
