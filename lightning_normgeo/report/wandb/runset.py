"""Sets of runs in a W&B report: their filter, grouping and columns, with the paths of settings at W&B."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.run_settings import has_own_config
from lightning_normgeo.report.setting_roles import is_norm
from lightning_normgeo.runs.records.record import evaluation_stem
from lightning_normgeo.runs.verdicts.logged_verdicts import headlines


def runset(wr: Any, runs: Sequence[Run], grouped: Sequence[Run], table: bool = False) -> Any:
    """Return a set of runs of a report; if W&B's id of one run is unknown, the set has all runs of the project.

    Its entity and project stay empty, which stands for those of the report: setting them would need the network.

    Args:
        wr: The module ``wandb_workspaces.reports.v2``.
        runs: Runs to show.
        grouped: Runs to group by all differing settings except seeds; empty for no grouping.
        table: Whether to set the columns of the table of runs.
    """
    known = ids(runs)
    return wr.Runset(
        name="normgeo",
        filters=f"Metric('ID') in {known!r}" if known else "",
        groupby=[f"config.{path}" for path in grouping(grouped)],
        pinned_columns=columns(runs) if table else [],
    )


def columns(runs: Sequence[Run]) -> list[str]:
    """Return the columns of the table of runs: the settings that differ, headline values, and the accuracies."""
    return [
        "run:displayName",
        *(f"config:{path}" for name in runs[0].differing if (path := _path(runs, name))),
        *(f"summary:{key}" for key in dict.fromkeys(key for run in runs for key in _of_training(run))),
        *(f"summary:robustness/{attack}/accuracy" for attack in attacks(runs)),
    ]


def grouping(runs: Sequence[Run]) -> list[str]:
    """Return the paths at W&B of the settings that tell groups apart, normalizations first."""
    names = list(runs[0].kind) if runs else []
    return [path for name in sorted(names, key=lambda name: not is_norm(name)) if (path := _path(runs, name))]


def attacks(runs: Sequence[Run]) -> list[str]:
    """Return the names of all attacks under which at least one run was evaluated."""
    return list(dict.fromkeys(row["attack"] for run in runs for row in run.results))


def _of_training(run: Run) -> Mapping[str, float]:
    """Return the headline values of a training; accuracies have columns for each attack."""
    return headlines(replace(run.record, results={}))


def evaluations(runs: Sequence[Run]) -> list[str]:
    """Return the first parts of the keys of all evaluations, such as ``robustness``."""
    return [evaluation_stem(name) for name in dict.fromkeys(name for run in runs for name in run.record.evaluations)]


def ids(runs: Sequence[Run]) -> list[str]:
    """Return W&B's ids of the runs; empty if one of them is unknown."""
    found = [wandb_id(run) for run in runs]
    return [name for name in found if name is not None] if None not in found else []


def wandb_id(run: Run) -> str | None:
    """Return W&B's id of a run; None if it is unknown or not a valid id."""
    known = run.record.settings.get("wandb")
    name = known.get("id") if isinstance(known, Mapping) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,128}", name):  # the id becomes part of a filter
        return None
    return name


def _path(runs: Sequence[Run], setting: str) -> str | None:
    """Return the path of a setting at W&B; None if it is within a list, into which W&B cannot look."""
    return next(filter(None, (_path_in(run.record.settings, setting) for run in runs)), None)


def _path_in(settings: Mapping[str, Any], setting: str) -> str | None:
    """Return the path of a setting in one run: ``value`` follows the key it was logged under, which may have dots."""
    in_config = _path_to(settings, f"config.{setting}") if has_own_config(settings) else None
    return in_config or _path_to(settings, setting)


def _path_to(settings: Mapping[str, Any], name: str) -> str | None:
    """Return the path of a dotted name, of which the longest beginning that was logged as a key is the key."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        name, inside = ".".join(parts[:k]), parts[k:]
        if name in settings and _has(settings[name], inside):
            return ".".join([name, "value", *inside])
    return None


def _has(value: Any, path: Sequence[str]) -> bool:
    """Whether nested mappings have an entry at a path."""
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True
