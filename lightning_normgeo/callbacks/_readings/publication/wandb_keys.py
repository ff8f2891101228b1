"""Selection of the metric keys sent to W&B: by default about twenty, since W&B draws a chart for each key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_normgeo.callbacks._monitors.measured_step import Monitor
from lightning_normgeo.runs.quantities.table import QUANTITIES

AGGREGATES = frozenset(quantity.key for quantity in QUANTITIES.values() if quantity.in_wandb)


def for_wandb(scalars: Mapping[str, float], monitors: Iterable[Monitor]) -> dict[str, float]:
    """Return the numbers of a measured step that are sent to W&B.

    Args:
        scalars: all numbers of the step, by metric key.
        monitors: the monitors that measured the step. A monitor with ``wandb_keys="all"`` sends all keys of its groups;
            a monitor with chosen ``layers`` also sends the keys of these layers.
    """
    monitors = list(monitors)
    whole = {group for monitor in monitors if monitor.wandb_keys == "all" for group in monitor.groups}
    chosen = {group for monitor in monitors if monitor.layers is not None for group in monitor.groups}
    sent = {}
    for key, value in scalars.items():
        group = key.partition("/")[0]
        is_of_one_layer = key.count("/") > 1
        if key in AGGREGATES or group in whole or (group in chosen and is_of_one_layer):
            sent[key] = value
    return sent


def without_chart(keys: Iterable[str], monitors: Iterable[Monitor]) -> list[str]:
    """Return the keys of single layers that nobody chose, for which W&B should not draw a chart each."""
    chosen = {group for monitor in monitors if monitor.layers is not None for group in monitor.groups}
    return [key for key in keys if key.count("/") > 1 and key.partition("/")[0] not in chosen]
