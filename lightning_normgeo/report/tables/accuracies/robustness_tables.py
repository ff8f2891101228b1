"""Tables of accuracies under attack and of the drops by each attack, as Tables 1 and 2 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.tables.accuracies.evaluations import (
    UNKNOWN_DATA,
    Evaluation,
    attacks_of,
    data_of,
    problems_of,
)
from lightning_normgeo.report.tables.cells import NOTHING, anchor, interval, named, percent, points, sentences
from lightning_normgeo.report.tables.table import Cell, Table, number, text
from lightning_normgeo.robustness.results.statistics.statistics import mean_interval, wilson_interval
from lightning_normgeo.utilities.attack_names import attack_title, norm_of, strength

_BESIDE = 6
"""Up to so many attacks, ``clean`` included, have a column each; more have a row each, to fit a narrow screen."""
_SINGLE = "In brackets Wilson's 95 % interval of this one network's accuracy: another seed gives another network."
_SEVERAL = (
    "Accuracies are means over runs, in brackets Student's 95 % interval over runs that differ in their seed, on the "
    "same samples; none where all agree. Counts are summed."
)
_MIXED = (
    "In brackets a 95 % interval: of one run Wilson's, of that network alone; of several, whose accuracies are "
    "averaged and counts summed, Student's over runs."
)
_NO_TEST = "Intervals that overlap are no test of a difference; the paired differences are."
_NO_TARGETS = (
    "The accuracies of the paper's Tables 1 and 2 come without counts, intervals and the settings of the attack: they "
    "are no targets."
)
_DROP = "Clean accuracy minus accuracy under the attack (the paper's Acc-Diff), in percentage points."
_PAIRED = "In brackets a 95 % interval: of one run for paired samples (Bonett, Price 2012)"
_OVER_RUNS = ", of several runs Student's over runs"
_LOW = "A network that is hardly right to begin with has little to lose: read a drop beside the clean accuracy."

Groups = dict[str, list[Evaluation]]
"""Evaluations by :attr:`Run.group`: those of a group differ in their seeds only."""


def robustness_tables(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> list[Table]:
    """Return a table of accuracies and one of drops for each data set.

    Args:
        evaluations: Evaluations of the runs.
        runs: All runs of the report, also those without an evaluation.
    """
    sets = list(dict.fromkeys(evaluation.data for evaluation in evaluations))
    tables = []
    for data in sets:
        groups: Groups = {}
        for evaluation in evaluations:
            if evaluation.data == data:
                groups.setdefault(evaluation.run.group, []).append(evaluation)
        suffix = anchor(data) if len(sets) > 1 else ""
        of_data = "" if data == UNKNOWN_DATA else f": {data}"
        tables.append(_accuracies(f"robustness-{suffix}".rstrip("-"), of_data, groups, runs))
        if len(attacks_of(_all(groups))) > 1:
            tables.append(_drops(f"robustness-drops-{suffix}".rstrip("-"), of_data, groups))
    return tables


def _accuracies(name: str, of_data: str, groups: Groups, runs: Sequence[Run]) -> Table:
    """Return the table of accuracies on one data set."""
    data = {evaluation.data for evaluation in _all(groups)}
    without = [run.name for run in runs if not run.results and data_of(run) in data]
    caption = sentences(
        _by_runs(groups, _SINGLE, _SEVERAL, _MIXED),
        _repeated(groups),
        _NO_TEST if len(groups) > 1 else "",
        _conditions(groups),
        _sizes(groups),
        f"Not evaluated: {named(without)}." if without else "",
        _NO_TARGETS,
    )
    columns, rows = _laid_out(groups, attacks_of(_all(groups)), "accuracy", _accuracy)
    return Table(name, f"Accuracy under attack{of_data}", caption, columns, rows)


def _drops(name: str, of_data: str, groups: Groups) -> Table:
    """Return the table of drops from the clean accuracy on one data set."""
    missing = [f"{reason} ({named(names)})" for reason, names in problems_of(_all(groups)).items()]
    caption = sentences(
        _DROP,
        _by_runs(groups, f"{_PAIRED}.", "In brackets Student's 95 % interval over runs.", f"{_PAIRED}{_OVER_RUNS}."),
        f"Without samples no paired interval: {'; '.join(missing)}." if missing else "",
        _LOW,
    )
    attacks = [attack for attack in attacks_of(_all(groups)) if attack.partition("/")[0] != "clean"]
    columns, rows = _laid_out(groups, attacks, "drop", _drop)
    return Table(name, f"Accuracy lost to each attack{of_data}", caption, columns, rows)


def _laid_out(
    groups: Groups, attacks: Sequence[str], quantity: str, cell: Callable[[Sequence[Evaluation], str], Cell]
) -> tuple[list[str], list[list[Cell]]]:
    """Return the columns and rows of a table: a column for each attack, or a row for each if there are many."""
    titles = {attack: _titled(attack, _all(groups)) for attack in attacks}
    if len(attacks_of(_all(groups))) <= _BESIDE:
        return ["network", "runs", *titles.values()], [
            [text(group), number(len(members), "d"), *(cell(members, attack) for attack in attacks)]
            for group, members in groups.items()
        ]
    return ["attack", "network", "runs", quantity], [
        [text(titles[attack]), text(group), number(len(members), "d"), cell(members, attack)]
        for attack in attacks
        for group, members in groups.items()
    ]


def _accuracy(members: Sequence[Evaluation], attack: str) -> Cell:
    """Return the mean accuracy of a group with its 95 % interval and counts: Wilson's of one run, else Student's."""
    rows = [member.rows[attack] for member in members if attack in member.rows and member.rows[attack]["n"]]
    if not rows:
        return NOTHING
    values = [row["accuracy"] for row in rows]
    correct = sum(row["correct"] for row in rows)
    n = sum(row["n"] for row in rows)
    low, high = mean_interval(values) if len(rows) > 1 else _wilson(rows[0])
    shown = f"{percent(fmean(values))} {interval(low, high, least=0.0)} {correct}/{n}"
    return Cell(shown + _fewer(rows, members), fmean(values))


def _wilson(row: dict[str, float]) -> tuple[float, float]:
    """Return the Wilson interval of a row, computed if the row lacks it."""
    if "ci_low" in row and "ci_high" in row:
        return row["ci_low"], row["ci_high"]
    return wilson_interval(int(row["correct"]), int(row["n"]))


def _drop(members: Sequence[Evaluation], attack: str) -> Cell:
    """Return the mean drop of a group with its 95 % interval: the paired one of one run, else Student's."""
    having = [member for member in members if attack in member.rows and member.rows[attack]["n"]]
    if not having:
        return NOTHING
    values = [member.rows[attack]["accuracy_drop"] for member in having]
    low, high = mean_interval(values)
    if len(having) == 1 and (found := having[0].drop(attack)):
        low, high = found["ci_low"], found["ci_high"]
    shown = f"{points(fmean(values))} {interval(low, high)}"
    return Cell(shown + _fewer(having, members), fmean(values))


def _fewer(having: Sequence[object], members: Sequence[Evaluation]) -> str:
    """Return a note with the number of runs behind a cell; empty if it has all of them."""
    return "" if len(having) == len(members) else f" ({len(having)} of {len(members)} runs)"


def _titled(attack: str, evaluations: Sequence[Evaluation]) -> str:
    """Return the title of an attack with its strength, if all runs have the same or the name has it."""
    for key, symbol in (("eps", "ε"), ("std", "σ")):
        strengths = {evaluation.rows[attack].get(key) for evaluation in evaluations if attack in evaluation.rows}
        value = strengths.pop() if len(strengths) == 1 else None
        if value is not None and f"_{key}" not in attack:
            return f"{attack}, {symbol} = {strength(value, norm_of(attack))}"
    return attack_title(attack)


def _conditions(groups: Groups) -> str:
    """Return a sentence about attacks whose settings differ between runs; empty if there are none."""
    found = []
    for attack in attacks_of(_all(groups)):
        conditions = [e.conditions(attack).items() for e in _all(groups) if attack in e.rows]
        names = sorted({key for one in conditions for key, _ in one ^ conditions[0]})
        if names:
            found.append(f"{attack} ({named(names)})")
    return f"Not the same attack for all runs, so not to be compared: {'; '.join(found)}." if found else ""


def _repeated(groups: Groups) -> str:
    """Return a sentence about groups that have several runs with the same seed; empty if there are none."""
    found = [name for name, members in groups.items() if len({one.run.seeds for one in members}) < len(members)]
    return f"Runs with the same seed say nothing about other seeds: {named(found)}." if found else ""


def _sizes(groups: Groups) -> str:
    """Return a sentence about different numbers of samples; empty if all are the same."""
    sizes = {evaluation.rows[attack]["n"] for evaluation in _all(groups) for attack in evaluation.rows}
    return f"Runs were evaluated on {min(sizes)} to {max(sizes)} samples." if len(sizes) > 1 else ""


def _by_runs(groups: Groups, single: str, several: str, mixed: str) -> str:
    """Return one of three texts: for tables whose cells are of single runs, of several runs, or partly of each."""
    attacks = attacks_of(_all(groups))
    counts = [sum(attack in member.rows for member in members) for members in groups.values() for attack in attacks]
    if max(counts) == 1:
        return single
    return mixed if 1 in counts else several


def _all(groups: Groups) -> list[Evaluation]:
    return [evaluation for members in groups.values() for evaluation in members]
