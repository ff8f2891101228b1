"""Table of the control with rescaled weights, which shows whether the norm of the weights alone has any effect."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation, attacks_of
from lightning_normgeo.report.tables.cells import NOTHING, points
from lightning_normgeo.report.tables.table import Cell, Table, number, text
from lightning_normgeo.utilities.attack_names import control_of, split_attack

_CAPTION = (
    "Every network evaluated twice: as it is, and with all scale-invariant weights longer by a factor and running "
    "statistics to match. The function is the same but for ε and rounding, so a raw norm alone changes no accuracy and "
    "no robustness. Decisions that differ, over all conditions; and the largest difference between two accuracies."
)


def control_table(evaluations: Sequence[Evaluation]) -> Table | None:
    """Return a table with a row for each run that was also evaluated with rescaled weights; None if no run was."""
    rows = [_row(evaluation) for evaluation in evaluations if _pairs(evaluation)]
    if not rows:
        return None
    columns = ["network", "factor", "conditions", "decisions that differ", "of", "largest difference"]
    return Table("control", "The control: the same function with longer weights", _CAPTION, columns, rows)


def _pairs(evaluation: Evaluation) -> list[str]:
    """Return the attacks of an evaluation that have a control."""
    return [attack for attack in attacks_of([evaluation]) if control_of(attack) in evaluation.rows]


def _row(evaluation: Evaluation) -> list[Cell]:
    attacks = _pairs(evaluation)
    changed = [evaluation.changed(attack) for attack in attacks]
    known = [count for count in changed if count is not None]
    rows = evaluation.rows
    largest = max(abs(rows[control_of(attack)]["accuracy"] - rows[attack]["accuracy"]) for attack in attacks)
    factor = evaluation.run.evaluation_settings(split_attack(attacks[0])[1]).get("rescale")
    return [
        text(evaluation.run.name),
        number(float(factor)) if factor else NOTHING,
        number(len(attacks), "d"),
        number(sum(known), "d") if len(known) == len(changed) else NOTHING,
        number(sum(rows[attack]["n"] for attack in attacks), "d"),
        Cell(points(largest), largest),
    ]
