"""Selection of the metric keys sent to W&B: by default about thirty, two dozen of them with charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_normgeo.callbacks._monitors.measured_step import Monitor
from lightning_normgeo.runs.quantities.table import QUANTITIES
from lightning_normgeo.runs.verdicts.claims.claims import VERDICT_KEYS

_WITH_CHART = frozenset(quantity.key for quantity in QUANTITIES.values() if quantity.in_wandb)
_FOR_VERDICTS = frozenset(VERDICT_KEYS) - _WITH_CHART
"""Further keys by which a report of runs at W&B gives the verdicts that a report of their own records gives."""
AGGREGATES = _WITH_CHART | _FOR_VERDICTS
"""Keys that are sent to W&B of every monitor."""


def for_wandb(scalars: Mapping[str, float], monitors: Iterable[Monitor]) -> dict[str, float]:
    """Return the numbers of a measured step that are sent to W&B.

    Args:
        scalars: all numbers of the step, by metric key.
        monitors: the monitors that measured the step. A monitor with ``wandb_keys="all"`` sends all keys of its groups;
            a monitor with chosen ``layers`` also sends the keys of these layers.
    """
    monitors = list(monitors)
    whole = _whole(monitors)
    chosen = {group for monitor in monitors if monitor.layers is not None for group in monitor.groups}
    sent = {}
    for key, value in scalars.items():
        group = key.partition("/")[0]
        is_of_one_layer = key.count("/") > 1
        if key in AGGREGATES or group in whole or (group in chosen and is_of_one_layer):
            sent[key] = value
    return sent


def without_chart(keys: Iterable[str], monitors: Iterable[Monitor]) -> list[str]:
    """Return the keys of single layers and for verdicts that nobody chose, for which W&B should not draw charts."""
    monitors = list(monitors)
    chosen = {group for monitor in monitors if monitor.layers is not None for group in monitor.groups}
    whole = _whole(monitors)
    found = []
    for key in keys:
        group = key.partition("/")[0]
        if (key.count("/") > 1 and group not in chosen) or (key in _FOR_VERDICTS and group not in whole):
            found.append(key)
    return found


def _whole(monitors: Iterable[Monitor]) -> set[str]:
    """Return the groups of which all keys are sent."""
    return {group for monitor in monitors if monitor.wandb_keys == "all" for group in monitor.groups}
