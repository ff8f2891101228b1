"""Panels of a W&B report and of a view of a project, built without a network."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.story import INCREMENTS, ORTHOGONALITY, Section
from lightning_normgeo.report.training_keys import accuracy_keys, loss_keys
from lightning_normgeo.report.wandb.downloaded_records import STEP
from lightning_normgeo.report.wandb.runset import attacks
from lightning_normgeo.runs.quantities.key_meanings import meaning_of
from lightning_normgeo.runs.quantities.quantity import Quantity
from lightning_normgeo.runs.quantities.table import QUANTITIES
from lightning_normgeo.utilities.attack_names import is_control

WIDTH, HEIGHT, COLUMNS = 24, 8, 3
"""Width of a grid of panels and height of a panel, in W&B's units, and the number of panels in a row."""
MOST_RUNS = 100
"""Runs that a panel shows."""


def module(name: str) -> Any:
    """Return a module of wandb-workspaces.

    Raises:
        ConfigurationError: If it is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"Reports of W&B need {error.name}: pip install 'lightning-normgeo[wandb-reports]'"
        ) from error


def logged(runs: Sequence[Run]) -> dict[str, None]:
    """Return the keys that at least one run has at W&B, in the order in which they were logged."""
    return dict.fromkeys(key for run in runs for key in run.record.metrics if run.record.is_at_wandb(key))


def section_panels(wr: Any, runs: Sequence[Run], section: Section) -> list[Any]:
    """Return a panel for each curve of a section that at least one run has at W&B."""
    wanted = [QUANTITIES[key] for key in section.wandb_keys or section.keys]
    known = logged(runs)
    found = [(quantity, key) for quantity in wanted for key in _matching(quantity.key, known)]
    return [
        lines(wr, _panel_title(quantity, key), [key], _unit(key), quantity.log_scale, place(wr, i))
        for i, (quantity, key) in enumerate(found)
    ]


def training_panels(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return the panels of the losses and accuracies that the project logged."""
    wanted = {"loss": loss_keys(runs), "accuracy": accuracy_keys(runs)}
    found = {title: keys for title, keys in wanted.items() if keys}
    return [lines(wr, title, keys, "", False, place(wr, i)) for i, (title, keys) in enumerate(found.items())]


def headline_panels(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return the panels that show the main quantities together, each with those it is compared with."""
    known = logged(runs)
    panels: list[Any] = []
    for section, title in ((ORTHOGONALITY, "largest |cos(W, ∇W)|"), (INCREMENTS, "Δ‖W‖² of a step")):
        keys = [key for key in section.keys if key in known]
        if keys:
            panels.append(lines(wr, title, keys, _unit(keys[0]), section is ORTHOGONALITY, place(wr, len(panels))))
    accuracies = [f"robustness/{attack}/accuracy" for attack in attacks(runs) if not is_control(attack)]
    if accuracies:
        panels.append(bars(wr, "accuracy under each attack", accuracies, (0.0, 1.0), place(wr, len(panels))))
    return panels


def place(wr: Any, index: int) -> Any:
    """Return the layout of the panel with a given index, in rows from left to right."""
    width = WIDTH // COLUMNS
    return wr.Layout(x=index % COLUMNS * width, y=index // COLUMNS * HEIGHT, w=width, h=HEIGHT)


def lines(wr: Any, title: str, keys: Sequence[str], unit: str, log: bool, layout: Any) -> Any:
    """Return a panel with curves over the training steps."""
    return wr.LinePlot(
        title=title,
        x=STEP,
        y=list(keys),
        log_y=log or None,
        title_x="training step",
        title_y=unit or None,
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=MOST_RUNS,
        smoothing_type="none",
        layout=layout,
    )


def bars(wr: Any, title: str, keys: Sequence[str], span: tuple[float | None, float | None], layout: Any) -> Any:
    """Return a panel with a bar for each key and run."""
    return wr.BarPlot(
        title=title,
        metrics=list(keys),
        orientation="h",
        range_x=span,
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=MOST_RUNS,
        max_bars_to_show=MOST_RUNS,
        layout=layout,
    )


def _matching(wanted: str, keys: Mapping[str, Any]) -> list[str]:
    """Return the wanted key, or of a key with a layer the first one that some run has; empty if there is none."""
    prefix, of_layers, _ = wanted.partition("{layer}")
    if of_layers:
        return [key for key in keys if key.startswith(prefix)][:1]
    return [wanted] if wanted in keys else []


def _panel_title(quantity: Quantity, key: str) -> str:
    """Return the title of a panel, with the layer if the quantity has a key for each layer."""
    if key == quantity.key:
        return quantity.wandb_title
    layer = key.rpartition("/")[2]
    return f"{quantity.wandb_title} ({layer})"


def _unit(key: str) -> str:
    """Return the unit of a key for an axis; empty for plain numbers."""
    unit, _ = meaning_of(key)
    return "" if unit == "1" else unit
