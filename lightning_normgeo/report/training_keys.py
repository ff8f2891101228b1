"""Keys under which the project of a run logged its losses and accuracies."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.runs.quantities.table import QUANTITIES

_MOST = 3
"""Curves of a figure: more would be those of the classes or heads of a model."""
_TESTED = re.compile(r"test", re.IGNORECASE)
_LOSS, _ACCURACY = re.compile(r"loss", re.IGNORECASE), re.compile(r"acc(?!el)", re.IGNORECASE)


def loss_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys of curves of losses."""
    return _keys(runs, _LOSS)


def accuracy_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys of curves of accuracies without attack."""
    return _keys(runs, _ACCURACY)


def _keys(runs: Sequence[Run], pattern: re.Pattern[str]) -> list[str]:
    """Return the keys of one kind of curve, but for a single value at the end and those of the package."""
    keys = dict.fromkeys(key for run in runs for key, points in run.record.metrics.items() if len(points) > 1)
    ours = tuple({f"{key.partition('/')[0]}/" for key in QUANTITIES})
    found = [key for key in keys if pattern.search(key) and not key.startswith(ours) and not _TESTED.search(key)]
    # Lightning logs a metric of a step also as its mean over an epoch, under names with these endings
    return sorted(key for key in found if f"{key.removesuffix('_epoch')}_step" not in keys)[:_MOST]
