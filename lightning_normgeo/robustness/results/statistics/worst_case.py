"""The worst case over attacks, sample by sample: a sample is robust only if it withstands all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_normgeo.robustness.attacks.attack import Attack
from lightning_normgeo.robustness.attacks.builders import UNBOUNDED
from lightning_normgeo.robustness.attacks.foreign_attack import TorchattacksAttack
from lightning_normgeo.robustness.attacks.native_attacks import BallAttack, Transfer
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows
from lightning_normgeo.utilities.attack_names import WORST, control_of, is_control


@dataclass(frozen=True)
class WorstCase:
    """A worst case over attacks, with what each of them adds to it.

    Attributes:
        name: the name of the row, ``worst``, or ``worst_eps0.0314`` if there are several radii.
        attacks: the attacks of this radius and of smaller ones, in the order in which they are listed.
        broken: number of samples that each attack breaks.
        gained: number of samples that each attack breaks and none before it, clean images included.
        alone: number of samples that only this attack breaks.
    """

    name: str
    attacks: tuple[str, ...]
    broken: dict[str, int]
    gained: dict[str, int]
    alone: dict[str, int]


def worst_cases(decisions: SampleResults, attacks: Sequence[Attack]) -> list[WorstCase]:
    """Add rows of the worst case to the results, and return what each attack adds to them.

    Attacks within a ball of one norm are taken together, with all parts of a suite, if a radius has several. In a ball
    are also the perturbations that were found at smaller radii, so that the worst case never rises with the radius.
    Each row is over the samples that all of its attacks have results for. Noise is no attack, and attacks without a
    radius, which look for the smallest perturbation, are left out.

    Args:
        decisions: the per-sample results of an evaluation, to which the rows are added.
        attacks: the attacks of the evaluation.
    """
    groups: dict[tuple[str, bool], dict[float, list[str]]] = {}
    for attack in attacks:
        if attack.role == UNBOUNDED or (isinstance(attack, BallAttack) and attack.bisections):
            continue  # the ball is only a bound of what is looked for
        if isinstance(attack, (BallAttack, TorchattacksAttack, Transfer)) and attack.eps is not None:
            key = attack.norm, isinstance(attack, BallAttack) and attack.times_sqrt_d
            groups.setdefault(key, {}).setdefault(attack.eps, []).append(attack.name)
    found = []
    for name, names in _rows(groups):
        found.append(_added(decisions, name, names))
        controls = [control_of(one) for one in names]
        if set(controls) <= set(decisions.attacks):
            _added(decisions, control_of(name), controls)
    return found


def _rows(groups: Mapping[tuple[str, bool], Mapping[float, list[str]]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the attacks of each worst case, those of smaller radii before those of its own."""
    for (norm, _), by_radius in groups.items():
        within: list[str] = []
        for eps in sorted(by_radius):
            within = [*within, *by_radius[eps]]
            if max(map(len, by_radius.values())) > 1:
                name = f"{WORST}_l2" if norm == "l2" else WORST
                yield (f"{name}_eps{eps:.4g}" if len(by_radius) > 1 else name), within


def _added(decisions: SampleResults, name: str, attacks: Sequence[str]) -> WorstCase:
    """Add the row of a worst case, and return what each attack adds to it."""
    rows = list(_aligned([decisions.of(attack) for attack in attacks]))
    correct = torch.stack([one.correct for one in rows])
    losses = torch.stack([one.loss for one in rows])
    # of each sample the first attack that breaks it, else the one with the highest loss
    first = torch.where(correct.all(0), losses.nan_to_num(nan=torch.inf).argmax(0), (~correct).int().argmax(0))
    here = torch.arange(first.shape[0])
    columns = {field: torch.stack([getattr(one, field) for one in rows])[first, here] for field in SampleRows._fields}
    decisions.attach(name, SampleRows(**columns))
    clean_name = control_of("clean") if is_control(name) else "clean"
    (clean,) = _aligned([decisions.of(clean_name)], rows[0])
    before, gained = clean.correct, {}
    for attack, one in zip(attacks, correct, strict=True):
        gained[attack] = int((before & ~one).sum())
        before = before & one
    broken = {attack: int((~one).sum()) for attack, one in zip(attacks, correct, strict=True)}
    single = (~correct).sum(0) == 1
    alone = {attack: int((single & ~one).sum()) for attack, one in zip(attacks, correct, strict=True)}
    return WorstCase(name, tuple(attacks), broken, gained, alone)


def _aligned(rows: Sequence[SampleRows], like: SampleRows | None = None) -> Iterator[SampleRows]:
    """Yield the results of the samples that all attacks share, in one order."""
    first = rows[0] if like is None else like
    shared = torch.stack([torch.isin(first.sample, one.sample) for one in rows]).all(0)
    wanted = first.sample[shared]
    for one in rows:
        order = torch.argsort(one.sample)
        yield one.at(order[torch.searchsorted(one.sample[order], wanted)])
