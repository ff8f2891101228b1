"""Tables of what attacks add to each other, smallest radii, corruptions, classes and sanity checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation
from lightning_normgeo.report.tables.cells import NOTHING, interval, percent
from lightning_normgeo.report.tables.table import Cell, Table, number, text
from lightning_normgeo.robustness.results.logged_results import detail_tables as detail_tables_of
from lightning_normgeo.utilities.attack_names import NORM_TITLES, attack_title, is_control, split_attack

_WORST = (
    "A sample is robust only if it withstands all attacks with a radius up to this one. Breaks: samples that are wrong "
    "under the attack, also those that are wrong anyway; takes: those that are right under all attacks before it and "
    "on clean images; alone: those that are wrong under this attack only. An attack that takes nothing was not needed "
    "here."
)
_RADII = (
    "The smallest perturbation that an attack found for each sample, an upper bound of its distance to the decision "
    "boundary: 0 for samples that are misclassified anyway, ∞ for samples that were not broken. In brackets the 95 % "
    "interval of the median, from order statistics."
)
_CORRUPTED = (
    "Accuracy in percent, mean over severities, under corruptions of this package, which are of the kinds of "
    "CIFAR-10-C and ImageNet-C but not the same; the mean over all of them with Student's 95 % interval over samples."
)
_CLASSES = "Accuracy by true class, clean and in the worst case, or under the last attack if there is none."
_CHECKS = (
    "Checks after Carlini et al. 2019 that attacks find what there is. One that fails says that the accuracies under "
    "attack overestimate the robustness."
)
_VERIFIED = (
    "Attacks that searched in bfloat16, with every decision in full precision: samples that came near to the decision "
    "boundary, and some of the others at random, were attacked again in full precision, and that result counts. "
    "Changes at random tell that further decisions may differ."
)
_AGREE = (
    "Samples that are right on clean images, by what two attacks do to them: broken by both, by one of them, or by "
    "none. Attacks that break different samples are stronger together."
)
_FEW = 6
"""Up to so many attacks are compared in pairs."""
_MANY_CLASSES = 20
"""Up to so many classes have a column each; of more, those with the lowest accuracies."""


def detail_tables(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return the tables for which there is data.

    Args:
        runs: Runs of the report.
        evaluations: Evaluations of the runs.
    """
    tables = [_worst(runs), _agreement(evaluations), _radii(runs), _corruptions(runs), _classes(runs), _checks(runs)]
    tables.append(
        _listed(runs, "verified", "verified", "Decisions of bfloat16 that were verified", _VERIFIED, attack_title)
    )
    return [table for table in tables if table is not None]


def _documents(runs: Sequence[Run]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the name of each run and loader, and the document of its evaluation."""
    for run in runs:
        for loader, document in run.evaluated_parts.items():
            yield f"{run.name} {loader}".rstrip(), document


def _parts(runs: Sequence[Run], key: str) -> Iterator[tuple[str, Any]]:
    """Yield the name of each run and loader, and the part of its evaluation's document with this key."""
    return ((name, document[key]) for name, document in _documents(runs) if document.get(key))


def _worst(runs: Sequence[Run]) -> Table | None:
    return _listed(runs, "worst", "worst-case", "What each attack adds", _WORST, attack_title)


def _checks(runs: Sequence[Run]) -> Table | None:
    return _listed(runs, "sanity", "sanity", "Are the attacks sound?", _CHECKS, str)


def _listed(
    runs: Sequence[Run], detail: str, anchor: str, title: str, caption: str, show: Callable[[str], str]
) -> Table | None:
    """Return the table of a kind of detail as loggers get it, for all runs; texts are shown by a function."""
    known = ((name, detail_tables_of(document).get(detail)) for name, document in _documents(runs))
    found = [(name, *table) for name, table in known if table is not None]
    if not found:
        return None
    rows = [
        [text(name), *(text(show(cell)) if isinstance(cell, str) else number(cell, "d") for cell in row)]
        for name, _, rows in found
        for row in rows
    ]
    return Table(anchor, title, caption, ["network", *found[0][1]], rows)


def _agreement(evaluations: Sequence[Evaluation]) -> Table | None:
    rows = []
    for one in evaluations:
        for loader, decisions in one.decisions.items():
            clean = decisions.of("clean")
            names = [
                split_attack(attack)[0]
                for attack in one.rows
                if split_attack(attack)[1] == loader and not is_control(attack)
            ]
            names = [name for name in names if not name.startswith(("clean", "gaussian", "worst"))]
            found = {name: decisions.of(name) for name in names}
            same = {name: rows for name, rows in found.items() if len(rows.sample) == len(clean.sample)}
            for first, second in combinations(same, 2) if len(same) <= _FEW else ():
                a, b = (~same[name].correct[clean.correct] for name in (first, second))
                counts = [int(part.sum()) for part in (a & b, a & ~b, ~a & b, ~a & ~b)]
                label = f"{one.run.name} {loader}".rstrip()
                titles = [text(attack_title(name)) for name in (first, second)]
                rows.append([text(label), *titles, *(number(count, "d") for count in counts)])
    columns = ["network", "first", "second", "both", "first only", "second only", "none"]
    return Table("agreement", "Do attacks break the same samples?", _AGREE, columns, rows) if rows else None


def _radii(runs: Sequence[Run]) -> Table | None:
    rows = [
        [
            text(name),
            text(attack_title(attack)),
            text(NORM_TITLES.get(one["norm"], str(one["norm"]))),
            _median(one),
            number(one["broken"], "d"),
            number(one["n"], "d"),
        ]
        for name, found in _parts(runs, "radii")
        for attack, one in found.items()
    ]
    columns = ["network", "attack", "norm", "median radius", "broken", "samples"]
    return Table("smallest-radii", "Smallest radii", _RADII, columns, rows) if rows else None


def _median(one: Mapping[str, Any]) -> Cell:
    low, high = (_radius(one[end]) for end in ("ci_low", "ci_high"))
    return Cell(f"{_radius(one['median'])} [{low}, {high}]", _finite(one["median"]))


def _radius(value: float | None) -> str:
    return "∞" if value is None else f"{value:.4g}"


def _finite(value: float | None) -> float:
    return math.inf if value is None else float(value)


def _corruptions(runs: Sequence[Run]) -> Table | None:
    found = list(_parts(runs, "corruptions"))
    if not found:
        return None
    known = dict.fromkeys(kind for _, one in found for kind in one["by_kind"])
    kinds = list(known)
    rows = [
        [
            text(name),
            Cell(f"{percent(one['accuracy'])} {interval(one['ci_low'], one['ci_high'], least=0.0)}", one["accuracy"]),
            *(_short(one["by_kind"].get(kind)) for kind in kinds),
        ]
        for name, one in found
    ]
    return Table("corruptions", "Accuracy under corruptions", _CORRUPTED, ["network", "mean", *kinds], rows)


def _short(value: float | None) -> Cell:
    return NOTHING if value is None else Cell(f"{100 * value:.1f}", value)


def _percent(value: float | None) -> Cell:
    return NOTHING if value is None else Cell(percent(value), value)


def _classes(runs: Sequence[Run]) -> Table | None:
    chosen = [(run, row) for run in runs for row in _shown_by_class(run) if row.get("by_class")]
    if not chosen:
        return None
    labels = sorted({int(label) for _, row in chosen for label in row["by_class"]})
    if len(labels) > _MANY_CLASSES:
        labels = sorted(sorted(labels, key=_lowest(chosen))[:_MANY_CLASSES])
    rows = [
        [text(run.name), text(attack_title(row["attack"])), *(_of_class(row, label) for label in labels)]
        for run, row in chosen
    ]
    return Table("by-class", "Accuracy by class", _CLASSES, ["network", "attack", *map(str, labels)], rows)


def _shown_by_class(run: Run) -> list[dict[str, Any]]:
    """Return the clean row and the worst or the last one, of the first loader."""
    rows = [row for row in run.results if not is_control(row["attack"])]
    attacked = [row for row in rows if not row["attack"].startswith(("clean", "gaussian"))]
    worst = [row for row in attacked if row["attack"].startswith("worst")] or attacked
    return [*(row for row in rows[:1] if row["attack"].startswith("clean")), *worst[-1:]]


def _of_class(row: Mapping[str, Any], label: int) -> Cell:
    counts = row["by_class"].get(str(label), row["by_class"].get(label))
    return _percent(counts[0] / counts[1]) if counts and counts[1] else NOTHING


def _lowest(chosen: Sequence[tuple[Run, Mapping[str, Any]]]) -> Callable[[int], float]:
    def accuracy(label: int) -> float:
        values = [_of_class(row, label).value for _, row in chosen]
        return min((value for value in values if isinstance(value, float)), default=math.inf)

    return accuracy
