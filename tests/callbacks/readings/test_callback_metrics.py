"""Every logged aggregate is documented, and in ``trainer.callback_metrics`` with the value of the last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normgeo import (
    AffineConvergenceMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
)
from lightning_normgeo.runs.quantities.key_meanings import meaning_of
from support.projects import Project, Rows, images, sgd, trainer

GROUPS = ("orthogonality", "orthogonality_control", "norm_growth", "norm_growth_control", "affine")


class TwoViews(Project):
    """Project whose layers run twice in a step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first, second = self(batch[0]), self(batch[0].flip(-1))
        return nn.functional.cross_entropy(first + second, batch[1])


def lbfgs(module: nn.Module) -> Any:
    return torch.optim.LBFGS(module.parameters(), lr=0.01, max_iter=2)


@pytest.mark.filterwarnings("ignore:What one gradient explains is left out")  # LBFGS
@pytest.mark.parametrize("project", [Project, TwoViews])
@pytest.mark.parametrize(
    "optimizers", [sgd(), sgd(momentum=0.9, weight_decay=0.01), lbfgs], ids=["sgd", "decay", "lbfgs"]
)
def test_every_logged_aggregate_is_in_callback_metrics(project: type[Project], optimizers: Callable[..., Any]) -> None:
    rows = Rows()
    monitors = [OrthogonalityMonitor(), NormGrowthMonitor(cumulative=True), AffineConvergenceMonitor()]
    run = trainer(*monitors, steps=3, logger=rows)
    run.fit(project(optimizers), images())
    last = rows.rows[-1][1]
    aggregates = {key: value for key, value in last.items() if key.count("/") == 1}
    assert len(aggregates) > 15
    assert [key for key in last if not all(meaning_of(key))] == []
    watched = {key: float(value) for key, value in run.callback_metrics.items() if key.partition("/")[0] in GROUPS}
    assert watched == pytest.approx(aggregates, rel=1e-6)
