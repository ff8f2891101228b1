"""Panels of results that a run has once: accuracies under attack, effective weights, and masked channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_normgeo.report import story
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.recorded_channels import REPLACED, results_of
from lightning_normgeo.report.story import Section
from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation
from lightning_normgeo.report.tables.correlations import strongest_attack
from lightning_normgeo.report.wandb.panels import bars, logged, place
from lightning_normgeo.report.wandb.runset import attacks
from lightning_normgeo.robustness.results.logged_results import EXAMPLES, RESULTS, detail_tables
from lightning_normgeo.runs.quantities.channels import CHANNELS
from lightning_normgeo.runs.quantities.effective_weights import EFFECTIVE, GROUP
from lightning_normgeo.runs.records.record import evaluation_stem
from lightning_normgeo.utilities.attack_names import attack_title

_CORRUPTED = "robustness/corruptions/accuracy"
_WHOLE = (None, None)
"""The range of an axis that W&B chooses."""


def attack_panels(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return panels with the accuracy and the drop under each attack."""
    quantities = (("accuracy", (0.0, 1.0)), ("accuracy_drop", _WHOLE))
    found = [
        (f"{attack}: {quantity.replace('_', ' ')}", f"robustness/{attack}/{quantity}", span)
        for attack in attacks(runs)
        for quantity, span in quantities
        # no panel of the drop at each radius of an attack, and none of the drop of clean images
        if quantity == "accuracy" or not (attack == "clean" or "_eps" in attack)
    ]
    if _CORRUPTED in logged(runs):
        found.append(("corruptions: mean accuracy", _CORRUPTED, (0.0, 1.0)))
    return [bars(wr, title, [key], span, place(wr, i)) for i, (title, key, span) in enumerate(found)]


def weight_results(wr: Any, runs: Sequence[Run]) -> list[tuple[Section, list[Any], list[str]]]:
    """Return the sections of effective weights and masked channels, with their panels and the keys of their tables."""
    effective = [f"{GROUP}/layers"] if any(key.startswith(f"{GROUP}/") for key in logged(runs)) else []
    channels = [f"{CHANNELS}/{name}" for name in ("results", "table") if any(results_of(run) for run in runs)]
    return [
        (story.EFFECTIVE_WEIGHTS, _effective_panels(wr, runs), effective),
        (story.CHANNELS, _channel_panels(wr, runs), channels),
    ]


def _effective_panels(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return a panel for each quantity of effective weights, and of several attacked runs the accuracy against it."""
    known = logged(runs)
    found = [quantity for quantity in EFFECTIVE if quantity.key in known]
    panels = [bars(wr, one.wandb_title, [one.key], _WHOLE, place(wr, i)) for i, one in enumerate(found)]
    counts = [Evaluation(run, {row["attack"]: row for row in run.results}, {}) for run in runs if run.results]
    attack = strongest_attack(counts)
    if attack is None or len(counts) == 1:
        return panels
    for one in found:
        panels.append(
            wr.ScatterPlot(
                title=f"accuracy under {attack_title(attack)} against {one.wandb_title}",
                x=wr.SummaryMetric(one.key),
                y=wr.SummaryMetric(f"robustness/{attack}/accuracy"),
                layout=place(wr, len(panels)),
            )
        )
    return panels


def _channel_panels(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return a panel for each share of channels and replacement: a bar for each criterion and for the whole network."""
    whole, panels = f"{CHANNELS}/clean/accuracy", dict[tuple[float, str], list[str]]()
    for row in (row for run in runs for row in results_of(run)):
        ratio, replaced = float(row["ratio"]), str(row.get("replace"))
        key = f"{CHANNELS}/{row.get('criterion')}/{replaced}/{ratio:g}/accuracy"
        keys = panels.setdefault((ratio, replaced), [whole])
        if key not in keys:
            keys.append(key)
    return [
        bars(wr, f"{100 * ratio:g} % of channels {REPLACED.get(name, name)}", keys, (0.0, 1.0), place(wr, i))
        for i, ((ratio, name), keys) in enumerate(panels.items())
    ]


def result_tables(runs: Sequence[Run], stems: Sequence[str]) -> list[str]:
    """Return the keys of the tables of evaluations: their results, and the details that some run has."""
    keys = [f"{stem}/{RESULTS}" for stem in stems]
    for run in runs:
        for name, found in run.record.evaluations.items():
            stem = evaluation_stem(name)
            for loader, part in found.get("loaders", {"": found}).items():
                keys += [f"{stem}/{detail}{loader}" for detail in detail_tables(part)]
    return list(dict.fromkeys(keys))


def example_keys(runs: Sequence[Run], stems: Sequence[str]) -> list[str]:
    """Return the keys of the example images that some run has, of the evaluations with these beginnings of keys."""
    known = {key for run in runs for key in run.record.images}
    return [key for stem in stems if (key := f"{stem}/{EXAMPLES}") in known]
