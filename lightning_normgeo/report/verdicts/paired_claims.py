"""Verdicts on weight decay and on spheres, from pairs of runs that are otherwise equal, on the same samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.run_settings import number_of
from lightning_normgeo.report.setting_roles import is_weight_decay
from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation, attacks_of
from lightning_normgeo.report.tables.accuracies.run_pairs import Pair, contrasts_of
from lightning_normgeo.report.tables.cells import named
from lightning_normgeo.robustness.results.statistics.statistics import holm, mcnemar
from lightning_normgeo.runs.quantities.spheres import ON_SPHERES
from lightning_normgeo.runs.verdicts.claims.robustness_claims import ATTACK, KINDS, NOISE
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import REFUTED, SUPPORTED, UNDECIDED, Verdict
from lightning_normgeo.runs.verdicts.wording import counted, p_value, points
from lightning_normgeo.utilities.attack_names import is_control, split_attack

if TYPE_CHECKING:  # it needs torch
    from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows

_CALLBACKS = "trainer.callbacks"
_Votes = Counter[tuple[str, int]]
"""For each sample, by loader and identity, how many more comparisons it wins than it loses with weight decay."""


@dataclass(frozen=True)
class _PairVotes:
    """One pair of runs under all conditions of a kind.

    Attributes:
        pair: The pair: without weight decay first.
        votes: Votes of the samples.
        differences: Difference of the accuracies under each condition, with minus without weight decay.
        attacks: The conditions.
        n: Number of samples under each condition.
    """

    pair: Pair
    votes: _Votes
    differences: list[float]
    attacks: list[str]
    n: int


def paired_verdicts(evaluations: Sequence[Evaluation], thresholds: Thresholds) -> dict[str, Verdict]:
    """Return the verdicts on weight decay under noise and attacks, and on spheres; claims without a pair are left out.

    Their p-values are adjusted together by Holm's procedure.
    """
    voted: dict[str, list[_PairVotes]] = {}
    problems: dict[str, list[str]] = {}
    for key, (pairs_of, belongs) in _CLAIMS.items():
        found, refused = _voted(list(pairs_of(evaluations)), belongs)
        if found:
            voted[key] = found
        elif refused:
            problems[key] = refused
    adjusted = holm([_p_value(*_votes(some)) for some in voted.values()])
    judged = {key: _judged(some, p, thresholds) for (key, some), p in zip(voted.items(), adjusted, strict=True)}
    unpaired = {
        key: Verdict(UNDECIDED, reason="pairs cannot be compared", detail=f"{named(dict.fromkeys(why))}.")
        for key, why in problems.items()
    }
    return judged | unpaired


def _decay_pairs(evaluations: Sequence[Evaluation]) -> Iterator[Pair]:
    """Yield the pairs of runs that differ in weight decay alone, of which the first has none."""
    for settings, contrasts in contrasts_of(evaluations).items():
        if len(settings) == 1 and is_weight_decay(settings[0]):
            for pair in (pair for contrast in contrasts for pair in contrast.pairs):
                if number_of(pair.first.run.differing[settings[0]]) == 0:
                    yield pair


def _sphere_pairs(evaluations: Sequence[Evaluation]) -> Iterator[Pair]:
    """Yield the pairs of runs that differ in callbacks alone, of which only the second was trained on spheres."""
    alike: dict[tuple[Any, ...], tuple[list[Evaluation], list[Evaluation]]] = {}
    for evaluation in evaluations:
        settings = [pair for pair in evaluation.run.differing.items() if not pair[0].startswith(_CALLBACKS)]
        free, projected = alike.setdefault((evaluation.data, *settings), ([], []))
        (projected if evaluation.run.record.points(ON_SPHERES) else free).append(evaluation)
    for free, projected in alike.values():
        for one, other in zip(free, projected, strict=False):
            yield Pair(one, other, one.run.repeat)


def _is_clean(attack: str) -> bool:
    return attack.startswith("clean") and not is_control(attack)


_CLAIMS: dict[str, tuple[Callable[[Sequence[Evaluation]], Iterator[Pair]], Callable[[str], bool]]] = {
    "decay_noise": (_decay_pairs, KINDS[NOISE]),
    "decay_attack": (_decay_pairs, KINDS[ATTACK]),
    "sphere_training": (_sphere_pairs, _is_clean),
}
"""For each claim the pairs of runs that test it, and the conditions."""


def _voted(pairs: Sequence[Pair], belongs: Callable[[str], bool]) -> tuple[list[_PairVotes], list[str]]:
    """Return the votes of each pair under the conditions of a kind, and why others could not be compared."""
    found, refused = [], []
    for pair in pairs:
        votes, differences, attacks, n = Counter[tuple[str, int]](), [], [], 0
        for attack in filter(belongs, attacks_of([pair.first])):
            if attack not in pair.second.rows:
                continue
            try:
                compared = pair.first.against(pair.second, attack)
            except ConfigurationError as error:
                refused.append(f"{error}".rstrip("."))
                continue
            votes.update(_votes_under(pair, attack))
            differences.append(compared["difference"])
            attacks.append(attack)
            n = max(n, compared["n"])
        if attacks:
            found.append(_PairVotes(pair, votes, differences, attacks, n))
    return found, refused


def _votes_under(pair: Pair, attack: str) -> dict[tuple[str, int], int]:
    """Return 1 for each sample that only the run with weight decay gets right, −1 for the reverse, 0 for others."""
    name, loader = split_attack(attack)
    without, decayed = (_correct(one.decisions[loader].of(name)) for one in (pair.first, pair.second))
    return {(loader, sample): decayed[sample] - without[sample] for sample in without.keys() & decayed.keys()}


def _correct(rows: SampleRows) -> dict[int, int]:
    return dict(zip(rows.sample.tolist(), rows.correct.int().tolist(), strict=True))


def _votes(some: Sequence[_PairVotes]) -> tuple[int, int]:
    """Return the numbers of samples that win and that lose, over all pairs and conditions together."""
    total = Counter[tuple[str, int]]()
    for one in some:
        total.update(one.votes)
    return sum(vote > 0 for vote in total.values()), sum(vote < 0 for vote in total.values())


def _p_value(won: int, lost: int) -> float:
    return mcnemar(lost, won)


def _judged(some: Sequence[_PairVotes], p: float, thresholds: Thresholds) -> Verdict:
    """Return the verdict on the votes of all pairs, with the adjusted p-value of all."""
    won, lost = _votes(some)
    difference = fmean(fmean(one.differences) for one in some)
    gains, falls = (sum(sign * fmean(one.differences) > 0 for one in some) for sign in (1, -1))
    agree = (gains if difference > 0 else falls) > len(some) / 2
    significant = p < thresholds.alpha and (won - lost) * difference > 0
    pairs = counted(len(some), "pair")
    word, reason = UNDECIDED, f"p = {p_value(p, thresholds.alpha, digits=2)}"
    if p < thresholds.alpha and not significant:
        reason = "samples and accuracies disagree"
    elif significant and (not agree or _opposed(some, difference, thresholds)):
        reason = f"{gains} of {pairs} with a gain"
    elif significant:
        word, reason = (SUPPORTED if difference > 0 else REFUTED), ""
    attacks = list(dict.fromkeys(attack for one in some for attack in one.attacks))
    counts = f"{counted(won, 'sample')} won, {lost} lost; {gains} of {pairs} with a gain."
    detail = f"{counts} About these networks: seeds differ."
    evidence = f"{pairs}, {named(attacks)}; n = {max(one.n for one in some)}"
    number, limit = points(difference, sign="+"), f"p {p_value(p, thresholds.alpha)}, level {thresholds.alpha:g}"
    found = Verdict(word, "gain", number, limit, reason, detail, evidence, difference)
    return replace(found, p_value=p if math.isfinite(p) else math.nan)


def _opposed(some: Sequence[_PairVotes], difference: float, thresholds: Thresholds) -> bool:
    """Whether a single pair differs significantly in the other direction than the mean."""
    adjusted = holm([_p_value(*_votes([one])) for one in some])
    return any(
        p < thresholds.alpha and fmean(one.differences) * difference < 0 for p, one in zip(adjusted, some, strict=True)
    )
