"""Publishing of a report and a workspace view at W&B."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.tables.table import Table
from lightning_normgeo.report.wandb.downloaded_records import connect, explained
from lightning_normgeo.report.wandb.report_spec import build_report
from lightning_normgeo.report.wandb.runset import wandb_id
from lightning_normgeo.report.wandb.workspace_spec import build_workspace


def publish_report(
    runs: Sequence[Run], entity: str, project: str, tables: Sequence[Table], title: str
) -> tuple[str, str]:
    """Save a new report and a new workspace view in a project of W&B; earlier ones are not replaced.

    They show only data that W&B has: runs that were logged offline have to be uploaded first. A warning names the runs
    that W&B lacks.

    Args:
        runs: Runs of the report.
        entity: Owner of the project.
        project: Project with the runs.
        tables: Tables of the report, which are copied into it.
        title: Title of the report and the view.

    Returns:
        The URLs of the report and of the view.

    Raises:
        ConfigurationError: If wandb-workspaces, an account or the network is missing, the project has none of the runs,
            or W&B refuses.
    """
    report = build_report(runs, entity, project, tables, title)
    workspace = build_workspace(runs, entity, project, title)
    api = connect()
    with explained(f"{entity}/{project} cannot be written", "Check the name, and that your account may write there."):
        _check_uploaded(api, runs, entity, project)
        report.save()
        workspace.save()
        return str(report.url), str(workspace.url)


def _check_uploaded(api: Any, runs: Sequence[Run], entity: str, project: str) -> None:
    """Warn about runs that W&B lacks; raise a ConfigurationError if it lacks all of them or the project."""
    known = {name: run for run in runs if (name := wandb_id(run)) is not None}
    there = _present(api, f"{entity}/{project}", list(known))
    missing = [name for name in known if there is None or name not in there]
    if there is not None and not missing:
        return
    upload = f"Upload with wandb sync -e {entity} -p {project} {_offline(known, missing)}"
    lacks = f"{entity}/{project} lacks {len(missing)} of {len(runs)} runs ({', '.join(missing)})."
    if there is None:
        raise ConfigurationError(f"W&B has no project {entity}/{project}. A report shows what W&B has. {upload}")
    if len(missing) == len(runs):
        raise ConfigurationError(f"{lacks} A report shows what W&B has, and would be empty. {upload}")
    warn_once(f"{lacks} The report does not show them. {upload}")


def _present(api: Any, path: str, ids: list[str]) -> set[str] | None:
    """Return the ids of the runs that W&B has, or None if it has no such project."""
    try:
        return {run.id for run in api.runs(path, filters={"name": {"$in": ids}})}
    except ValueError:
        return None


def _offline(known: Mapping[str, Run], missing: Sequence[str]) -> str:
    """Return W&B's offline folders of some runs for a shell command, if they are where the command line puts them."""
    places = {name: known[name].record.folder.parent.parent / "wandb" for name in missing}
    found = [folder for name, place in places.items() for folder in sorted(place.glob(f"offline-run-*-{name}"))]
    return shlex.join(map(str, found)) if found else "and the folders offline-run-… of these runs"
