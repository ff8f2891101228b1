"""Smallest radii at which an attack succeeded, sample by sample: their median, and the curve of the accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.attack import Attack
from lightning_normgeo.robustness.attacks.foreign_attack import TorchattacksAttack
from lightning_normgeo.robustness.attacks.native_attacks import BallAttack
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows
from lightning_normgeo.utilities.attack_names import control_of

_POINTS = 50
"""Intervals of a curve."""


@dataclass(frozen=True)
class SmallestRadii:
    """Smallest perturbations of one attack, in units of the threat model's space.

    Attributes:
        norm: norm of the perturbations, ``linf`` or ``l2``.
        median: median over all samples: 0 for a sample that is misclassified without an attack, infinite for one that
            was not broken.
        ci_low: lower end of its 95 % interval, an order statistic.
        ci_high: upper end.
        broken: number of samples that were broken.
        n: number of samples.
        curve: pairs of a radius and the accuracy under smaller perturbations, from the smallest radius to the largest.
    """

    norm: str
    median: float
    ci_low: float
    ci_high: float
    broken: int
    n: int
    curve: list[tuple[float, float]]


def smallest_radii(decisions: SampleResults, attacks: Sequence[Attack]) -> dict[str, SmallestRadii]:
    """Return the smallest radii of the attacks that look for them, by row.

    These are attacks with ``bisections``, and torchattacks' CW and DeepFool.
    """
    found = {}
    for attack in attacks:
        norm = _norm_of(attack)
        for name in (attack.name, control_of(attack.name)) if norm else ():
            if name in decisions.attacks and len(decisions.of(name).index):
                found[name] = summary_of(radii_of(decisions.of(name), norm), norm)
    return found


def _norm_of(attack: Attack) -> str:
    """Return the norm in which an attack looks for the smallest perturbation; empty if it does not."""
    if isinstance(attack, BallAttack):
        return attack.norm if attack.bisections else ""
    return "l2" if isinstance(attack, TorchattacksAttack) and attack.attack in ("CW", "DeepFool") else ""


def radii_of(rows: SampleRows, norm: str) -> Tensor:
    """Return the norm of each sample's perturbation, infinite for samples that are not broken, in float64."""
    norms = (rows.linf if norm == "linf" else rows.l2).double()
    return norms.masked_fill(rows.correct, math.inf)


def summary_of(radii: Tensor, norm: str) -> SmallestRadii:
    """Return the summary of smallest radii, with the distribution-free interval of the median.

    The k-th and the (n + 1 - k)-th smallest of n radii enclose the median of the population with a probability of at
    least 95 %, for the largest k with P(Bin(n, 1/2) < k) ≤ 2.5 %.
    """
    ordered, n = radii.sort().values, len(radii)
    k = _order(n)
    finite = ordered[ordered.isfinite()]
    low, high = (float(ordered[k - 1]), float(ordered[n - k])) if k > 0 else (0.0, math.inf)
    edges = torch.linspace(0, float(finite[-1]), _POINTS + 1, dtype=torch.float64) if len(finite) else ordered[:0]
    curve = [(float(edge), float((ordered > edge).double().mean())) for edge in edges]
    return SmallestRadii(norm, _median(ordered), low, high, len(finite), n, curve)


def _order(n: int) -> int:
    """Return the largest k with P(Bin(n, 1/2) < k) ≤ 2.5 %."""
    total, k = 0.0, 0
    while True:
        log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        total += math.exp(log)
        if total > 0.025:
            return k
        k += 1


def _median(ordered: Tensor) -> float:
    n = len(ordered)
    return float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
