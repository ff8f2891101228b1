"""The paper's Tables 1 and 2: accuracies under attack, and what each attack takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.tables.cells import NOTHING, anchor, interval, named, percent, points, sentences
from lightning_normgeo.report.tables.evaluations import UNKNOWN_DATA, Evaluation, attacks_of, data_of, problems_of
from lightning_normgeo.report.tables.table import Cell, Table, number, text
from lightning_normgeo.robustness.results.statistics import mean_interval, wilson_interval

_BESIDE = 6
"""So many attacks, ``clean`` among them, have a column each; more have a row each, which a narrow screen can show."""
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


def robustness_tables(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> list[Table]:
    """Return for each data set a table of accuracies and one of drops.

    Args:
        evaluations: of the runs.
        runs: all of the report, also those without an evaluation.
    """
    sets = list(dict.fromkeys(evaluation.data for evaluation in evaluations))
    tables = []
    for data in sets:
        groups: Groups = {}
        for evaluation in evaluations:
            if evaluation.data == data:
                groups.setdefault(evaluation.run.group, []).append(evaluation)
        suffix, of_data = (anchor(data) if len(sets) > 1 else ""), "" if data == UNKNOWN_DATA else f": {data}"
        tables.append(_accuracies(f"robustness-{suffix}".rstrip("-"), of_data, groups, runs))
        if len(attacks_of(_all(groups))) > 1:
            tables.append(_drops(f"robustness-drops-{suffix}".rstrip("-"), of_data, groups))
    return tables


def _accuracies(name: str, of_data: str, groups: Groups, runs: Sequence[Run]) -> Table:
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
    """Return columns and rows: attacks beside each other, or below each other where they are many."""
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
    rows = [member.rows[attack] for member in members if attack in member.rows and member.rows[attack]["n"]]
    if not rows:
        return NOTHING
    values, correct, n = [row["accuracy"] for row in rows], *(sum(row[key] for row in rows) for key in ("correct", "n"))
    low, high = mean_interval(values) if len(rows) > 1 else _wilson(rows[0])
    shown = f"{percent(fmean(values))} {interval(low, high, least=0.0)} {correct}/{n}"
    return Cell(shown + _fewer(rows, members), fmean(values))


def _wilson(row: dict[str, float]) -> tuple[float, float]:
    if "ci_low" in row and "ci_high" in row:
        return row["ci_low"], row["ci_high"]
    return wilson_interval(int(row["correct"]), int(row["n"]))


def _drop(members: Sequence[Evaluation], attack: str) -> Cell:
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
    """Say of how many runs a cell is, where it is not of all."""
    return "" if len(having) == len(members) else f" ({len(having)} of {len(members)} runs)"


def _titled(attack: str, evaluations: Sequence[Evaluation]) -> str:
    """Return an attack's name with its strength, if that is the same everywhere and not in the name."""
    for key, symbol in (("eps", "ε"), ("std", "σ")):
        strengths = {evaluation.rows[attack].get(key) for evaluation in evaluations if attack in evaluation.rows}
        strength = strengths.pop() if len(strengths) == 1 else None
        if strength is not None and f"_{key}" not in attack:
            return f"{attack}, {symbol} = {strength:.4g}"
    return attack


def _conditions(groups: Groups) -> str:
    """Say which attacks are not the same for all runs."""
    found = []
    for attack in attacks_of(_all(groups)):
        conditions = [e.conditions(attack).items() for e in _all(groups) if attack in e.rows]
        names = sorted({key for one in conditions for key, _ in one ^ conditions[0]})
        if names:
            found.append(f"{attack} ({named(names)})")
    return f"Not the same attack for all runs, so not to be compared: {'; '.join(found)}." if found else ""


def _repeated(groups: Groups) -> str:
    """Name the networks with runs of the same seed."""
    found = [name for name, members in groups.items() if len({one.run.seeds for one in members}) < len(members)]
    return f"Runs with the same seed say nothing about other seeds: {named(found)}." if found else ""


def _sizes(groups: Groups) -> str:
    sizes = {evaluation.rows[attack]["n"] for evaluation in _all(groups) for attack in evaluation.rows}
    return f"Runs were evaluated on {min(sizes)} to {max(sizes)} samples." if len(sizes) > 1 else ""


def _by_runs(groups: Groups, single: str, several: str, mixed: str) -> str:
    """Return what holds where every cell is of a single run, or of several, or some are of either."""
    attacks = attacks_of(_all(groups))
    counts = [sum(attack in member.rows for member in members) for members in groups.values() for attack in attacks]
    return single if max(counts) == 1 else mixed if 1 in counts else several


def _all(groups: Groups) -> list[Evaluation]:
    return [evaluation for members in groups.values() for evaluation in members]
