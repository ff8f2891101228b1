"""Tables of what a report lacks: steps that were not measured, and runs without a record."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.sources import AbsentRun
from lightning_normgeo.report.tables.table import Table, text

_NONE_MEASURED = "normgeo measured 0 of "
"""Beginning of the summary of a training in which the monitors measured no step."""
_NOT_MEASURED = (
    "Steps at which the monitors measured nothing, although they were due, and trainings that ended before the first "
    "measurement. A step whose gradients are not finite has no geometry. Where nothing was measured, every_n_steps was "
    "larger than the number of steps."
)
_ABSENT = (
    "Runs of the study that have no record: they failed before anything was measured, or have not begun. The same "
    "command again tries them again; output.log in the folder of a run has all that it printed."
)


def not_measured_table(runs: Sequence[Run]) -> Table | None:
    """Return a table with a row for each run in which monitors left out steps, or measured none; None if there is none.

    The rows are the lines with which the trainings ended.
    """
    rows = []
    for run in runs:
        said = run.record.observed.get("summary")
        if isinstance(said, str) and (run.record.observed.get("left_out") or said.startswith(_NONE_MEASURED)):
            rows.append([text(run.name), text(said.removeprefix("normgeo "))])
    if not rows:
        return None
    return Table("not-measured", "Steps without a measurement", _NOT_MEASURED, ["run", "steps"], rows)


def absent_table(absent: Sequence[AbsentRun]) -> Table | None:
    """Return a table with a row for each run of a study that has no record; None if all have one."""
    if not absent:
        return None
    rows = [[text(run.name), text(run.status), text(run.error)] for run in absent]
    return Table("absent", "Runs that are not in this report", _ABSENT, ["run", "status", "why"], rows)
