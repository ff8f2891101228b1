"""Table of the rank correlations between norms of weights and accuracies, over the runs of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_normgeo.report.run_settings import MISSING
from lightning_normgeo.report.tables.accuracies.evaluations import UNKNOWN_DATA, Evaluation, attacks_of
from lightning_normgeo.report.tables.cells import NOTHING, anchor, sentences
from lightning_normgeo.report.tables.table import Cell, Table, number, text
from lightning_normgeo.robustness.results.statistics.rank_correlation import (
    RankCorrelation,
    rank_correlation,
    smallest_p_value,
)
from lightning_normgeo.robustness.results.statistics.statistics import holm
from lightning_normgeo.runs.quantities.effective_weights import EFFECTIVE, GROUP
from lightning_normgeo.utilities.attack_names import attack_title, split_attack

LEVEL = 0.05
"""Largest adjusted p-value of a correlation that counts as found."""
_LABELS = {quantity.key: quantity.label for quantity in EFFECTIVE}
_COLUMNS = ["quantity", "accuracy under", "ρ", "runs", "p", "p (Holm)", "larger goes with"]
_READ = (
    "Spearman's rank correlation ρ over runs, between a quantity of the evaluated weights and an accuracy, in brackets "
    "a 95 % interval (Bonett, Wright 2000), which is rough for few runs. p: permutation test, two-sided; p (Holm): "
    "adjusted for all tests of this table. W' = γW/√(σ² + ε) is the effective weight. A length ‖W‖ of weights in front "
    "of a normalization is no property of the function."
)
_FEW = (
    "With {n} runs no p-value of a rank correlation is below 2/n! = {least:.2g}, adjusted for {tests} tests "
    "{adjusted}: too few runs for any result."
)
_NO_CAUSE = "A correlation over runs that also differ in other settings is no cause."
_TOO_FEW = "too few runs"


@dataclass(frozen=True)
class Correlation:
    """The correlation of one quantity with the accuracy under one attack.

    Attributes:
        key: Metric key of the quantity.
        attack: Name of the attack.
        found: The correlation.
        values: The quantity of each run that has it.
        accuracies: The accuracy of each of these runs.
    """

    key: str
    attack: str
    found: RankCorrelation
    values: tuple[float, ...]
    accuracies: tuple[float, ...]


def correlation_tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return a table for each data set with at least two evaluated runs that have effective weights.

    Args:
        evaluations: Evaluations of the runs.
    """
    sets: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        if any(key.startswith(f"{GROUP}/") for key in evaluation.run.record.metrics):
            sets.setdefault(evaluation.data, []).append(evaluation)
    tables = [_table(data, members, len(sets) > 1) for data, members in sets.items() if len(members) > 1]
    return [table for table in tables if table.rows]


def strongest_attack(evaluations: Sequence[Evaluation]) -> str | None:
    """Return the attack that tells runs apart best: the lowest mean accuracy with at most one run at zero.

    Of attacks under which all runs are at zero, as of radii that are too large, no order of runs could be seen.
    """
    attacks = [
        attack for attack in _common(evaluations) if not split_attack(attack)[0].startswith(("clean", "gaussian"))
    ]
    accuracies = {attack: [_accuracy(one, attack) for one in evaluations] for attack in attacks}
    apart = {attack: sum(found) for attack, found in accuracies.items() if found.count(0.0) <= 1}
    return min(apart, key=apart.__getitem__) if apart else None


def _table(data: str, evaluations: Sequence[Evaluation], several: bool) -> Table:
    noise = next((a for a in _common(evaluations) if split_attack(a)[0].startswith("gaussian")), None)
    attacks = [attack for attack in (noise, strongest_attack(evaluations)) if attack is not None]
    tests = [
        test for key in _LABELS for attack in attacks if (test := correlation_of(key, attack, evaluations)) is not None
    ]
    sound = [test for test in tests if math.isfinite(test.found.p_value)]
    adjusted = dict(zip(sound, holm([test.found.p_value for test in sound]), strict=True))
    rows = [_row(test, adjusted.get(test), len(sound)) for test in tests]
    most = max((test.found.n for test in tests), default=0)
    few = ""
    if sound and _too_few(most, len(sound)):
        least = smallest_p_value(most)
        few = _FEW.format(n=most, least=least, tests=len(sound), adjusted=f"{min(1.0, len(sound) * least):.2g}")
    of_data = "" if data == UNKNOWN_DATA else f": {data}"
    name = anchor("correlations", data) if several else "correlations"
    caption = sentences(few, _READ, _NO_CAUSE)
    return Table(name, f"Norms that go with robustness{of_data}", caption, _COLUMNS, rows)


def _common(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the attacks that all runs were evaluated under."""
    return [a for a in attacks_of(evaluations) if all(one.rows.get(a, {}).get("n") for one in evaluations)]


def _accuracy(evaluation: Evaluation, attack: str) -> float:
    row = evaluation.rows[attack]
    return float(row["correct"] / row["n"])


def correlation_of(key: str, attack: str, evaluations: Sequence[Evaluation]) -> Correlation | None:
    """Return the correlation over the runs that have the quantity; None if fewer than two have it."""
    pairs = []
    for evaluation in evaluations:
        points = evaluation.run.record.points(key)
        if points:
            pairs.append((points[-1][1], _accuracy(evaluation, attack)))
    if len(pairs) < 2:
        return None
    values, accuracies = zip(*pairs, strict=True)
    return Correlation(key, attack, rank_correlation(values, accuracies), values, accuracies)


def _row(test: Correlation, adjusted: float | None, tests: int) -> list[Cell]:
    found = test.found
    head = [
        text(_LABELS[test.key]),
        text(attack_title(test.attack)),
    ]
    if adjusted is None:
        return [*head, NOTHING, number(found.n, "d"), NOTHING, NOTHING, text("the same in all runs")]
    ends = f"[{found.low:+.2f}, {found.high:+.2f}]" if math.isfinite(found.low) else f"[{MISSING}]"
    return [
        *head,
        Cell(f"{found.rho:+.2f} {ends}", found.rho),
        number(found.n, "d"),
        number(found.p_value, ".2g"),
        number(adjusted, ".2g"),
        text(_verdict(found, adjusted, tests)),
    ]


def _verdict(found: RankCorrelation, adjusted: float, tests: int) -> str:
    if _too_few(found.n, tests):
        return _TOO_FEW
    if adjusted > LEVEL:
        return "undecided"
    return "a higher accuracy" if found.rho > 0 else "a lower accuracy"


def _too_few(n: int, tests: int) -> bool:
    """Whether no correlation of n runs can be significant once it is adjusted for the number of tests."""
    return tests * smallest_p_value(n) > LEVEL
