"""Curves of a record as verdicts read them: values by step, their sums, ends and spans in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.wording import counted

_WINDOW = 10
"""Part of a curve, as 1 over this number, whose mean is its value at the start or at the end."""


def curve(record: Record, key: str) -> dict[int, float]:
    """Return the finite values of a metric by step."""
    return dict(record.points(key))


def magnitudes(record: Record, key: str) -> list[float]:
    """Return the magnitudes of a metric's finite values, in the order of the steps."""
    return [abs(value) for _, value in record.points(key)]


def relative_error(predicted: Mapping[int, float], measured: Mapping[int, float]) -> float | None:
    """Return Σ|predicted − measured| / Σ|measured| over the steps that have both; None if the sum is zero."""
    steps = predicted.keys() & measured.keys()
    total = sum(abs(measured[step]) for step in steps)
    return sum(abs(predicted[step] - measured[step]) for step in steps) / total if total else None


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last tenth of some values, of at least one value each."""
    window = max(1, len(values) // _WINDOW)
    return fmean(values[:window]), fmean(values[-window:])


def span(record: Record, *keys: str) -> str:
    """Return metric keys with their number of points and their steps, such as "a/b: 40 steps, 4 to 199"."""
    return "; ".join(_span(record, key) for key in keys if record.points(key))


def _span(record: Record, key: str) -> str:
    points = record.points(key)
    first, last = points[0][0], points[-1][0]
    return f"{key}: {counted(len(points), 'step')}, {first}" + (f" to {last}" if last != first else "")
