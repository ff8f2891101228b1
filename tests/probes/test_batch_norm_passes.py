"""Passes of batch normalizations that are counted, and those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_normgeo import AffineConvergenceMonitor, OrthogonalityMonitor, SymmetryMonitor
from support.projects import ConvNet, Project, Rows, images, trainer


class Segmented(ConvNet):
    """Network with one batch normalization inside an activation checkpoint and one outside."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        inside, outside = nn.Sequential(*list(self)[1:4]), nn.Sequential(*list(self)[4:])
        x = self[0](x)
        x = inside(x) if self.reentrant is None else checkpoint(inside, x, use_reentrant=self.reentrant)
        found: Tensor = outside(x)
        return found


class Checkpointed(Segmented):
    reentrant = False


class Reentrant(Segmented):
    reentrant = True


def affine(net: type[nn.Module], *monitors: Any) -> list[dict[str, float]]:
    """Return the values of AffineConvergenceMonitor in each of three steps."""
    torch.manual_seed(1)
    rows = Rows()
    project = Project(net=net())
    trainer(AffineConvergenceMonitor(), *monitors, steps=3, logger=rows).fit(project, images())
    return [{key: value for key, value in row.items() if key.startswith("affine/")} for _, row in rows.rows]


@pytest.mark.parametrize("monitor", [OrthogonalityMonitor, SymmetryMonitor])
@pytest.mark.parametrize("net", [Checkpointed, Reentrant])
def test_a_pass_that_the_search_repeats_is_not_counted(net: type[nn.Module], monitor: Any) -> None:
    expected, found = affine(Segmented), affine(net, monitor())
    assert len(found) == len(expected) == 3
    for step, values in enumerate(expected):
        assert found[step] == pytest.approx(values, rel=1e-4), step
