"""Pairs of evaluations for paired tests: of runs that differ in one setting and are otherwise equal, seed included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lightning_normgeo.report.run_labels import LONGEST
from lightning_normgeo.report.setting_roles import choice, choices, elided, is_norm, is_weight_decay
from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation


@dataclass(frozen=True)
class Pair:
    """Two evaluations to compare.

    Attributes:
        first: The reference.
        second: The evaluation that is compared with the reference.
        repeat: Label of the seed, or of what else tells the pair from similar ones.
    """

    first: Evaluation
    second: Evaluation
    repeat: str


@dataclass(frozen=True)
class Contrast:
    """The comparison of one kind of runs with another.

    Attributes:
        name: Label of the difference, such as "gn against bn".
        rest: Label of the settings that both kinds share and other runs of the report do not.
        pairs: Pairs of evaluations, one for each seed.
    """

    name: str
    rest: str
    pairs: list[Pair]


def contrasts_of(evaluations: Sequence[Evaluation]) -> dict[tuple[str, ...], list[Contrast]]:
    """Return, for each setting except seeds, the contrasts of its values with a reference value.

    The reference is the smallest value if all are numbers, otherwise the first one. Weight decay and the normalization
    come first, then the other settings. If no two runs differ in a single setting alone, each kind of runs is compared
    with the first kind, and the key has all settings in which runs differ.

    Args:
        evaluations: Evaluations of the runs.

    Returns:
        Contrasts by the names of the settings in which their runs differ; settings without contrasts are left out.
    """
    settings = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.run.kind))
    settings.sort(key=lambda name: (not is_weight_decay(name), not is_norm(name)))
    found: dict[tuple[str, ...], list[Contrast]] = {(name,): _contrasts(name, evaluations) for name in settings}
    if settings and not any(found.values()):
        found = {tuple(settings): _kinds(evaluations)}
    return {names: contrasts for names, contrasts in found.items() if contrasts}


def _contrasts(setting: str, evaluations: Sequence[Evaluation]) -> list[Contrast]:
    """Return the contrasts of a setting's values with the reference, for runs that are equal in all other settings."""
    alike: dict[tuple[str, ...], dict[str, list[Evaluation]]] = {}
    for evaluation in evaluations:
        rest = (value for name, value in evaluation.run.differing.items() if name != setting)
        members = alike.setdefault((evaluation.data, *rest), {})
        members.setdefault(evaluation.run.differing[setting], []).append(evaluation)
    reference, *others = _ordered(evaluation.run.differing[setting] for evaluation in evaluations)
    found: dict[tuple[str, ...], list[Pair]] = {}
    for value in others:
        for members in alike.values():
            for pair in _pairs(members.get(reference, []), members.get(value, [])):
                kind = (value, *(of for name, of in pair.first.run.kind.items() if name != setting))
                found.setdefault(kind, []).append(pair)
    named = choices(setting, [reference, *others])
    return [
        Contrast(f"{named[value]} against {named[reference]}", _rest(setting, pairs[0].first), pairs)
        for (value, *_), pairs in found.items()
    ]


def _kinds(evaluations: Sequence[Evaluation]) -> list[Contrast]:
    """Return the contrasts of each kind of runs with the first kind, paired by seed."""
    kinds: dict[str, dict[tuple[str, ...], list[Evaluation]]] = {}
    for evaluation in evaluations:
        seeds = (evaluation.data, *evaluation.run.seeds)
        kinds.setdefault(evaluation.run.group, {}).setdefault(seeds, []).append(evaluation)
    (reference, first), *others = kinds.items()
    pairs = {name: [p for seeds in first for p in _pairs(first[seeds], of.get(seeds, []))] for name, of in others}
    return [Contrast(f"{name} against {reference}", "", found) for name, found in pairs.items() if found]


def _pairs(first: Sequence[Evaluation], second: Sequence[Evaluation]) -> Iterator[Pair]:
    """Yield pairs of runs with the same seed; several runs with the same settings are paired in their order."""
    for one, other in zip(first, second, strict=False):
        folders = f"{one.run.record.folder.name}, {other.run.record.folder.name}"
        yield Pair(one, other, folders if max(len(first), len(second)) > 1 else one.run.repeat)


def _ordered(values: Iterable[str]) -> list[str]:
    """Return the different values, in increasing order if all of them are numbers."""
    found = list(dict.fromkeys(values))
    try:
        return sorted(found, key=float)
    except ValueError:
        return found


def _rest(setting: str, evaluation: Evaluation) -> str:
    """Return the label of the other settings, shortened because the table of settings has all of them."""
    return elided(
        ", ".join(choice(name, value) for name, value in evaluation.run.kind.items() if name != setting), LONGEST
    )
