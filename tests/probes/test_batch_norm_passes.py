"""Passes of batch normalizations that are counted, and those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from lightning_normgeo import AffineConvergenceMonitor, BatchGeometryMonitor, OrthogonalityMonitor, SymmetryMonitor
from lightning_normgeo.errors import MeasurementWarning
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


def affine(net: type[nn.Module], *monitors: Any, project: type[Project] = Project) -> list[dict[str, float]]:
    """Return the values of AffineConvergenceMonitor in each of three steps."""
    torch.manual_seed(1)
    rows = Rows()
    trainer(AffineConvergenceMonitor(layers="*"), *monitors, steps=3, logger=rows).fit(project(net=net()), images())
    return [{key: value for key, value in row.items() if key.startswith("affine/")} for _, row in rows.rows]


@pytest.mark.parametrize("monitor", [OrthogonalityMonitor, SymmetryMonitor])
@pytest.mark.parametrize("net", [Checkpointed, Reentrant])
def test_a_pass_that_the_search_repeats_is_not_counted(net: type[nn.Module], monitor: Any) -> None:
    expected, found = affine(Segmented), affine(net, monitor())
    assert len(found) == len(expected) == 3
    for step, values in enumerate(expected):
        assert found[step] == pytest.approx(values, rel=1e-4), step


class Pruned(Project):
    """Project that prunes nothing from γ and β of the first batch normalization, which are computed from then on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            for name in ("weight", "bias"):
                prune.custom_from_mask(self.net[1], name, torch.ones_like(getattr(self.net[1], name)))


def test_pruned_batch_normalizations_are_measured_in_every_step() -> None:
    expected, found = affine(ConvNet), affine(ConvNet, OrthogonalityMonitor(), project=Pruned)
    assert len(found) == len(expected) == 3
    for step, values in enumerate(expected):
        assert found[step] == pytest.approx(values, rel=1e-6), step


class Shaken(nn.Module):
    """Parametrization that draws a random number and counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * (1 + 0.1 * torch.rand(()))


def shaken(name: str) -> nn.Module:
    torch.manual_seed(1)
    net = ConvNet()
    register_parametrization(net[1], name, Shaken())
    return net


def shaken_training(name: str, rows: Rows, *monitors: Any) -> list[Tensor]:
    """Return the state of a training of three steps and its random numbers."""
    project = Project(net=shaken(name))
    trainer(*monitors, steps=3, logger=rows).fit(project, images())
    return [*project.state_dict().values(), torch.get_rng_state()]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parametrized_batch_normalizations_are_left_out_and_not_computed_once_more(name: str) -> None:
    rows = Rows()
    monitors = [AffineConvergenceMonitor(layers="*"), OrthogonalityMonitor(), BatchGeometryMonitor()]
    with pytest.warns(MeasurementWarning, match=r"of 1 layers are left out: γ or β is computed .*\(net.1\)"):
        observed = shaken_training(name, rows, *monitors)
    assert all(map(torch.equal, observed, shaken_training(name, Rows())))
    assert all("affine/gamma2_over_sigma2_mean/net.4" in row for _, row in rows.rows)
    assert not any("net.1" in key for _, row in rows.rows for key in row if key.startswith("affine/"))


class OffloadedLater(Project):
    """Project whose autograd nodes cannot be read from the second step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            return super().training_step(batch, batch_idx)
        with torch.autograd.graph.save_on_cpu():
            return super().training_step(batch, batch_idx)


def test_nodes_that_can_no_longer_be_read_are_named_as_such() -> None:
    with pytest.warns(MeasurementWarning, match="node could no longer be read, and its running statistics were not"):
        found = affine(ConvNet, OrthogonalityMonitor(), project=OffloadedLater)
    assert [bool(values) for values in found] == [True, False, True]


class InTurn(Project):
    """Project with an optimizer for each of two parts, which are trained in turn: some passes have no graph.

    ``toggle_optimizer`` freezes all parameters but those of one optimizer, as the layers in front of a batch
    normalization with γ.
    """

    first_part_first = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net=net)
        self.automatic_optimization = False
        self.seen: list[dict[str, list[Tensor]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append({"net.1": [], "net.4": []})
        optimizers = self.optimizers()[:: 1 if self.first_part_first else -1]
        for optimizer, half in zip(optimizers, (slice(0, 4), slice(4, 8)), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0][half]), batch[1][half]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def on_train_start(self) -> None:
        for name, own in (("net.1", self.net[1]), ("net.4", self.net[4])):
            own.register_forward_pre_hook(lambda layer, args, name=name: self._note(name, layer, args[0]))

    def _note(self, name: str, layer: nn.BatchNorm2d, x: Tensor) -> None:
        gap = layer.bias - x.mean((0, 2, 3))
        self.seen[-1][name].append(gap.detach().abs().mean())

    def configure_optimizers(self) -> Any:
        layers = list(self.net)
        return [torch.optim.SGD(nn.Sequential(*part).parameters(), lr=0.1) for part in (layers[:5], layers[5:])]


class InTurnFromBehind(InTurn):
    first_part_first = False


@pytest.mark.parametrize("project", [InTurn, InTurnFromBehind])
def test_passes_without_a_graph_are_counted_in_every_step(project: type[InTurn]) -> None:
    torch.manual_seed(1)
    rows, trained = Rows(), project(ConvNet().double())
    data = images(24, dtype=torch.float64)
    trainer(AffineConvergenceMonitor(layers="*"), steps=-1, max_epochs=1, logger=rows).fit(trained, data)
    assert len(rows.rows) == 3
    for (_, row), seen in zip(rows.rows, trained.seen, strict=True):
        for name, gaps in seen.items():
            assert len(gaps) == 2
            mean = float(torch.stack(gaps).mean())
            assert row[f"affine/abs_beta_minus_mu_mean/{name}"] == pytest.approx(mean, rel=1e-9)


class TwoPasses(Project):
    """Project whose first layers are frozen in one of two passes before the same backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first = self(batch[0])
        frozen = list(nn.Sequential(*list(self.net)[:5]).parameters())
        for parameter in frozen:
            parameter.requires_grad_(False)
        second = self(batch[0])
        for parameter in frozen:
            parameter.requires_grad_(True)
        return nn.functional.cross_entropy(first + second, batch[1])


def test_passes_that_cannot_be_read_are_said_to_be_left_out() -> None:
    monitor = AffineConvergenceMonitor()
    rows = Rows()
    trainer(monitor, steps=3, logger=rows).fit(TwoPasses(), images())
    assert len(rows.rows) == 3
    reason = "batch statistics of some layers: a pass without a graph was followed by others before a backward pass"
    assert monitor.left_out == {reason: 3}
