"""Accuracy under corruptions: the mean over kinds and severities, with its interval over samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_normgeo.robustness.attacks.attack import Attack
from lightning_normgeo.robustness.attacks.corruptions import Corruption
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.statistics.statistics import mean_interval


@dataclass(frozen=True)
class CorruptionSummary:
    """Accuracies under corruptions.

    Attributes:
        accuracy: mean over all kinds and severities.
        ci_low: lower end of its 95 % interval: Student's, over the samples' shares of corruptions that they withstand.
        ci_high: upper end.
        n: number of samples.
        by_kind: mean over severities, for each kind.
        by_severity: mean over kinds, for each severity.
    """

    accuracy: float
    ci_low: float
    ci_high: float
    n: int
    by_kind: dict[str, float]
    by_severity: dict[int, float]


def corruption_summary(decisions: SampleResults, attacks: Sequence[Attack]) -> CorruptionSummary | None:
    """Return the summary of all corruptions; None without any.

    Args:
        decisions: the per-sample results.
        attacks: the attacks of the evaluation.
    """
    found = [one for one in attacks if isinstance(one, Corruption) and one.name in decisions.attacks]
    if not found or not len(decisions.of(found[0].name).index):
        return None
    correct = {one: decisions.of(one.name).correct.double() for one in found}
    shares = torch.stack(list(correct.values())).mean(0)
    low, high = mean_interval(shares.tolist())
    kinds, severities = (dict.fromkeys(getattr(one, name) for one in found) for name in ("corruption", "severity"))

    def mean(name: str, value: str | int) -> float:
        return float(torch.stack([c.mean() for one, c in correct.items() if getattr(one, name) == value]).mean())

    return CorruptionSummary(
        accuracy=float(shares.mean()),
        ci_low=max(low, 0.0),
        ci_high=min(high, 1.0),
        n=len(shares),
        by_kind={kind: mean("corruption", kind) for kind in kinds},
        by_severity={k: mean("severity", k) for k in severities},
    )
