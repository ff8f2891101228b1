"""Units of several layers together: a residual stream is measured as one vector, with its own norm, angle and rate."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, RecordLogger, read_record
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.normalization.autograd.tracing import traced_graph
from lightning_normgeo.symmetries.units.discovery import search
from support.projects import Project, images, sgd, trainer

EPS = 1e-40
STREAM = ("net.stem.weight", "net.stem.bias", "net.position", "net.outs.0.weight", "net.outs.1.weight")
JOINT = "net.stem+4"


class Stream(nn.Module):
    """Two blocks that write into a residual stream, as in a transformer, in front of a layer normalization."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(24, width)
        self.position = nn.Parameter(torch.randn(1, 8, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=EPS) for _ in range(3))
        self.ins = nn.ModuleList(nn.Linear(width, 10) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(10, width, bias=False) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2).flatten(2)) + self.position
        for norm, first, second in zip(self.norms, self.ins, self.outs, strict=False):
            x = x + second(nn.functional.gelu(first(norm(x))))
        logits: Tensor = self.head(self.norms[2](x).mean(1))
        return logits


class Channels(nn.Module):
    """A pre-activation network with batch normalization: each channel of the stream is a unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(5, eps=EPS) for _ in range(2))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(self.norms[0](x).relu())
        logits: Tensor = self.head(self.norms[1](x).relu().mean((2, 3)))
        return logits


def project(net: nn.Module | None = None, optimizers: Any = None) -> Project:
    torch.manual_seed(0)
    return Project(optimizers or sgd(), net or Stream()).double()


def observed(folder: Path, own: Project, *callbacks: Any, steps: int = 5, **settings: Any) -> dict[str, list[float]]:
    logger = RecordLogger(str(folder))
    data = images(80, dtype=torch.float64)
    trainer(*callbacks, logger=logger, steps=steps, **{"precision": "64-true", **settings}).fit(own, data)
    return {key: [value for _, value in points] for key, points in read_record(logger.folder).metrics.items()}


class Stepper:
    """Trains a copy of a project by hand, and computes what the monitors should log for the joint unit."""

    def __init__(self, own: Project, names: tuple[str, ...], units: int = 1) -> None:
        self.own, self.names, self.units = copy.deepcopy(own).train(), names, units
        self.optimizer = self.own.configure_optimizers()
        self.found: list[dict[str, Tensor]] = []

    def _rows(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().clone().reshape(self.units, -1) for tensor in tensors], 1)

    def run(self, steps: int) -> list[dict[str, Tensor]]:
        for batch, _ in zip(images(80, dtype=torch.float64), range(steps), strict=False):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.own(batch[0]), batch[1]).backward()
            parameters = dict(self.own.named_parameters())
            chosen = [parameters[name] for name in self.names]
            before, gradient = self._rows(chosen), self._rows([p.grad for p in chosen if p.grad is not None])
            self.optimizer.step()
            after = self._rows(chosen)
            self.found.append(
                {
                    "cos": nn.functional.cosine_similarity(before, gradient),
                    "increment": after.square().sum(1) - before.square().sum(1),
                    "predicted": self.optimizer.param_groups[0]["lr"] ** 2 * gradient.square().sum(1),
                    "angle": torch.acos(nn.functional.cosine_similarity(before, after).clamp(-1, 1)),
                    "norm": before.norm(dim=1),
                }
            )
        return self.found


def test_a_residual_stream_is_one_unit() -> None:
    net = Stream().double()
    _, found = search(net, traced_graph(net, torch.rand(3, 3, 8, 8, dtype=torch.float64)))
    (joint,) = [units for units in found if units.kind == "joint"]
    assert {joint.name, *joint.others} == {name.removeprefix("net.") for name in STREAM}
    assert (joint.layer, joint.count, joint.normalization) == ("stem+4", 1, "3 × layer normalization")
    assert {units.name for units in found} == {"stem.weight", "ins.0.weight", "ins.1.weight", "head.weight"}


def test_sharded_models_keep_single_units() -> None:
    net = Stream().double()
    graph = traced_graph(net, torch.rand(3, 3, 8, 8, dtype=torch.float64))
    assert all(units.kind != "joint" for units in search(net, graph, joint=False)[1])


@pytest.mark.parametrize(
    ("net", "names", "layer", "units"),
    [
        (Stream, STREAM, JOINT, 1),
        (Channels, ("net.stem.weight", "net.conv.weight"), "net.stem+1", 5),
    ],
)
def test_plain_sgd_adds_the_squared_gradient_of_all_parts(
    tmp_path: Path, net: type[nn.Module], names: tuple[str, ...], layer: str, units: int
) -> None:
    own = project(net())
    expected = Stepper(own, names, units).run(5)
    metrics = observed(tmp_path, own, OrthogonalityMonitor(layers="*"), NormGrowthMonitor(layers="*", cumulative=True))
    for step, by_hand in enumerate(expected):
        assert metrics[f"orthogonality/max_abs_cos/{layer}"][step] < 1e-12
        increment = float(by_hand["increment"].sum())
        scale = float(by_hand["norm"].square().sum())
        assert abs(metrics[f"norm_growth/increment/{layer}"][step] - increment) < 1e-14 * scale
        assert math.isclose(
            metrics[f"norm_growth/predicted/{layer}"][step], float(by_hand["predicted"].sum()), rel_tol=1e-12
        )
    cumulative = sum(float(one["increment"].sum()) for one in expected)
    assert math.isclose(metrics[f"norm_growth/cumulative_increment/{layer}"][-1], cumulative, rel_tol=1e-9)
    assert not any("control" in key and "outs" in key for key in metrics)


def test_the_angle_and_the_equilibrium_are_those_of_one_vector(tmp_path: Path) -> None:
    own = project(optimizers=lambda module: torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1))
    expected = Stepper(own, STREAM).run(5)
    metrics = observed(tmp_path, own, NormGrowthMonitor(layers="*"))
    for step, by_hand in enumerate(expected):
        assert math.isclose(metrics[f"norm_growth/angular_update/{JOINT}"][step], float(by_hand["angle"]), rel_tol=1e-6)
    assert f"norm_growth/equilibrium_angle/{JOINT}" in metrics


def test_parts_under_different_rules_have_no_common_equilibrium(tmp_path: Path) -> None:
    def apart(module: nn.Module) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.01)

    own = project(optimizers=apart)
    expected = Stepper(own, STREAM).run(3)
    metrics = observed(tmp_path, own, NormGrowthMonitor(layers="*"), steps=3)
    assert f"norm_growth/equilibrium_angle/{JOINT}" not in metrics
    increments = [float(one["increment"]) for one in expected]
    assert metrics[f"norm_growth/increment/{JOINT}"] == pytest.approx(increments, rel=1e-9)
    assert metrics[f"norm_growth/explained/{JOINT}"] == pytest.approx(increments, rel=1e-9)


def test_training_is_bit_identical() -> None:
    plain, watched = project(), project()
    trainer(steps=5, precision="64-true").fit(plain, images(80, dtype=torch.float64))
    callbacks = OrthogonalityMonitor(), NormGrowthMonitor()
    trainer(*callbacks, steps=5, precision="64-true").fit(watched, images(80, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


class Halves(Project):
    """Two optimizers, each of which moves a part of the stream."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net=net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        return [
            torch.optim.SGD(matrices, lr=0.1),
            torch.optim.SGD([p for p in self.parameters() if p.ndim == 1], lr=0.1),
        ]


def test_parts_that_two_optimizers_move_are_controls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(MeasurementWarning, match="only together with 4 other parameters, some of which SGD does not"):
        metrics = observed(tmp_path, Halves(Stream()).double(), NormGrowthMonitor(layers="*"))
    assert f"norm_growth/increment/{JOINT}" not in metrics
    controls = {key.split("/")[2] for key in metrics if key.startswith("norm_growth_control/increment/")}
    assert controls >= {"net.stem", "net.outs.0", "net.outs.1", "net.ins.0"}


class TwoLosses(Project):
    """Two backward passes, the second of which reads one layer of the stream without a normalization."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.manual_backward(self.net.outs[0].weight.square().sum())  # type: ignore[index,union-attr]
        optimizer = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        return torch.zeros(())

    @property
    def automatic_optimization(self) -> bool:
        return False


def test_a_second_loss_that_reads_one_part_breaks_the_unit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = TwoLosses(sgd(), Stream()).double()
    with pytest.warns(MeasurementWarning, match="None of 7 weights is scale invariant"):
        metrics = observed(tmp_path, own, NormGrowthMonitor(layers="*"), OrthogonalityMonitor(layers="*"))
    assert not any(key.startswith("norm_growth/increment/") for key in metrics)
    controls = {key.split("/")[2] for key in metrics if key.startswith("norm_growth_control/increment/")}
    assert {"net.stem", "net.outs.0", "net.outs.1"} <= controls


def test_numbers_that_refute_a_joint_unit_make_its_weights_controls(tmp_path: Path) -> None:
    own = project()
    weight = own.net.outs[1].weight  # type: ignore[index,union-attr]
    weight.register_hook(lambda grad: grad + weight.detach())
    with pytest.warns(MeasurementWarning, match="controls from here on"):
        metrics = observed(tmp_path, own, OrthogonalityMonitor(layers="*"), steps=4)
    assert not any(key.startswith("orthogonality/max_abs_cos/") for key in metrics)
    assert len(metrics["orthogonality_control/max_abs_cos/net.outs.1"]) == 3  # from the second step on


def test_cumulative_sums_of_joint_units_survive_a_restart(tmp_path: Path) -> None:
    key = f"norm_growth/cumulative_predicted/{JOINT}"
    whole = observed(tmp_path / "whole", project(), NormGrowthMonitor(layers="*", cumulative=True), steps=20)
    half = trainer(NormGrowthMonitor(layers="*", cumulative=True), steps=10, precision="64-true")
    half.fit(project(), images(80, dtype=torch.float64))  # a whole epoch
    half.save_checkpoint(tmp_path / "half.ckpt")
    logger = RecordLogger(str(tmp_path / "rest"))
    rest = trainer(NormGrowthMonitor(layers="*", cumulative=True), logger=logger, steps=20, precision="64-true")
    rest.fit(project(), images(80, dtype=torch.float64), ckpt_path=tmp_path / "half.ckpt")
    metrics = read_record(logger.folder).metrics
    assert metrics[key][0] == (10, whole[key][10])
