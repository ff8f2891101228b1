"""Which evaluations can be compared pair by pair: those of runs that are equal in all else, the seed included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lightning_normgeo.report.runs import is_norm, is_seed, is_weight_decay, label
from lightning_normgeo.report.tables.evaluations import Evaluation


@dataclass(frozen=True)
class Pair:
    """Two evaluations.

    Attributes:
        first: the reference.
        second: what is compared with it.
        repeat: the seed, or what else tells the pair from those like it.
    """

    first: Evaluation
    second: Evaluation
    repeat: str


@dataclass(frozen=True)
class Contrast:
    """One kind of runs against another.

    Attributes:
        name: what differs.
        rest: what they have in common, as far as runs of the report differ in it.
        pairs: one for each seed.
    """

    name: str
    rest: str
    pairs: list[Pair]


def contrasts_of(evaluations: Sequence[Evaluation]) -> dict[tuple[str, ...], list[Contrast]]:
    """Return for each setting but seeds its values against the first one: weight decay, normalization, then others.

    Numbers are compared with the smallest, other values with what comes first. Where no two runs differ in one setting
    alone, each kind of runs is compared with the first; the key then has all settings in which they differ.
    """
    settings = [name for name in dict.fromkeys(s for e in evaluations for s in e.run.differing) if not is_seed(name)]
    settings.sort(key=lambda name: (not is_weight_decay(name), not is_norm(name)))
    found: dict[tuple[str, ...], list[Contrast]] = {(name,): _contrasts(name, evaluations) for name in settings}
    if settings and not any(found.values()):
        found = {tuple(settings): _kinds(evaluations)}
    return {names: contrasts for names, contrasts in found.items() if contrasts}


def _contrasts(setting: str, evaluations: Sequence[Evaluation]) -> list[Contrast]:
    alike: dict[tuple[str, ...], dict[str, list[Evaluation]]] = {}
    for evaluation in evaluations:
        rest = (value for name, value in evaluation.run.differing.items() if name != setting)
        members = alike.setdefault((evaluation.data, *rest), {})
        members.setdefault(evaluation.run.differing[setting], []).append(evaluation)
    reference, *others = _ordered(evaluation.run.differing[setting] for evaluation in evaluations)
    found: dict[tuple[str, str], list[Pair]] = {}
    for value in others:
        name = f"{_shown(setting, value)} against {_shown(setting, reference)}"
        for members in alike.values():
            for pair in _pairs(members.get(reference, []), members.get(value, [])):
                found.setdefault((name, _rest(setting, pair.first)), []).append(pair)
    return [Contrast(*names, pairs) for names, pairs in found.items()]


def _kinds(evaluations: Sequence[Evaluation]) -> list[Contrast]:
    """Return each kind of runs against the first, seed by seed."""
    kinds: dict[str, dict[tuple[str, ...], list[Evaluation]]] = {}
    for evaluation in evaluations:
        seeds = (value for name, value in evaluation.run.differing.items() if is_seed(name))
        kinds.setdefault(evaluation.run.group, {}).setdefault((evaluation.data, *seeds), []).append(evaluation)
    (reference, first), *others = kinds.items()
    pairs = {name: [p for seeds in first for p in _pairs(first[seeds], of.get(seeds, []))] for name, of in others}
    return [Contrast(f"{name} against {reference}", "", found) for name, found in pairs.items() if found]


def _pairs(first: Sequence[Evaluation], second: Sequence[Evaluation]) -> Iterator[Pair]:
    """Pair runs of the same seed; several that have everything in common in the order they came."""
    for one, other in zip(first, second, strict=False):
        folders = f"{one.run.record.folder.name}, {other.run.record.folder.name}"
        yield Pair(one, other, folders if max(len(first), len(second)) > 1 else one.run.repeat)


def _ordered(values: Iterable[str]) -> list[str]:
    """Return different values, rising if all of them are numbers."""
    found = list(dict.fromkeys(values))
    try:
        return sorted(found, key=float)
    except ValueError:
        return found


def _rest(setting: str, evaluation: Evaluation) -> str:
    own = evaluation.run.differing.items()
    return ", ".join(_shown(name, value) for name, value in own if name != setting and not is_seed(name))


def _shown(setting: str, value: str) -> str:
    return value if is_norm(setting) else label(setting, value)
