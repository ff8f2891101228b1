"""Table of the attacks without a result, with the reasons."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.recorded_channels import reasons_of
from lightning_normgeo.report.tables.table import Table, text

_CAPTION = (
    "What a model or its data do not offer, or what failed, is left out rather than guessed; the reason says what was "
    "found and what to do."
)


def not_evaluated_table(runs: Sequence[Run]) -> Table | None:
    """Return a table with a row for each requested attack that has no result; None if all have one."""
    rows = [
        [text(run.name), text(attack), text(reason)]
        for run in runs
        for evaluation in run.record.evaluations.values()
        for attack, reason in evaluation.get("not_evaluated", {}).items()
    ]
    rows += [[text(run.name), text(name), text(reason)] for run in runs for name, reason in reasons_of(run)]
    if not rows:
        return None
    return Table("robustness-not-evaluated", "Not evaluated", _CAPTION, ["network", "attack", "why"], rows)
