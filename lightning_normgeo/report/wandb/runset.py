"""Which runs a report of W&B shows, how they are grouped, and where W&B has what tells them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.run_settings import has_own_config
from lightning_normgeo.report.setting_roles import is_norm


def runset(wr: Any, runs: Sequence[Run], grouped: Sequence[Run], table: bool = False) -> Any:
    """Return a set of runs, and no others where W&B's name of each is known.

    Its own entity and project stay empty, which means those of the report: naming them would ask the network.

    Args:
        wr: the module ``wandb_workspaces.reports.v2``.
        runs: to show.
        grouped: runs of which those that differ in their seed alone are a group; none if nothing is to be grouped.
        table: whether the columns are chosen too.
    """
    known = ids(runs)
    return wr.Runset(
        name="normgeo",
        filters=f"Metric('ID') in {known!r}" if known else "",
        groupby=[f"config.{path}" for path in grouping(grouped)],
        pinned_columns=columns(runs) if table else [],
    )


def columns(runs: Sequence[Run]) -> list[str]:
    """Return the columns of the table of runs: what differs, and the accuracies."""
    return [
        "run:displayName",
        *(f"config:{path}" for name in runs[0].differing if (path := _path(runs, name))),
        *(f"summary:robustness/{attack}/accuracy" for attack in attacks(runs)),
    ]


def grouping(runs: Sequence[Run]) -> list[str]:
    """Return where W&B has the settings that tell groups apart, normalizations first."""
    names = list(runs[0].kind) if runs else []
    return [path for name in sorted(names, key=lambda name: not is_norm(name)) if (path := _path(runs, name))]


def attacks(runs: Sequence[Run]) -> list[str]:
    """Return the attacks that some run was evaluated under."""
    return list(dict.fromkeys(row["attack"] for run in runs for row in run.results))


def ids(runs: Sequence[Run]) -> list[str]:
    """Return W&B's names of the runs, or nothing if one of them is not known."""
    found = [wandb_id(run) for run in runs]
    return [name for name in found if name is not None] if None not in found else []


def wandb_id(run: Run) -> str | None:
    """Return W&B's name of a run, if it was logged there."""
    known = run.record.settings.get("wandb")
    name = known.get("id") if isinstance(known, Mapping) else None
    return name if isinstance(name, str) and re.fullmatch(r"[\w-]{1,128}", name) else None  # it gets into filters


def _path(runs: Sequence[Run], setting: str) -> str | None:
    """Return where W&B has a setting, or None: it cannot look into lists."""
    return next(filter(None, (_path_in(run.record.settings, setting) for run in runs)), None)


def _path_in(settings: Mapping[str, Any], setting: str) -> str | None:
    """Return where one run has a setting: ``value`` stands behind the name it was logged under, dots and all."""
    in_config = _path_to(settings, f"config.{setting}") if has_own_config(settings) else None
    return in_config or _path_to(settings, setting)


def _path_to(settings: Mapping[str, Any], name: str) -> str | None:
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        name, inside = ".".join(parts[:k]), parts[k:]
        if name in settings and _has(settings[name], inside):
            return ".".join([name, "value", *inside])
    return None


def _has(value: Any, path: Sequence[str]) -> bool:
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True
