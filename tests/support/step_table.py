"""The table of every optimizer in every way of taking a step: its cells, their trainings, and the checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, describe_lion, register_optimizer
from lightning_normgeo.geometry import IncrementTerms
from support.projects import OPTIMIZERS, Account, ConvNet, Fingerprint, Lion, Project, Rows, images, trainer

register_optimizer(Lion, describe_lion)

STEPS = 4

FUSED = ["sgd", "momentum", "nesterov-foreach", "adam", "adamw", "adagrad"]

SITES = {"norm_growth": ["net.0", "net.3"], "norm_growth_control": ["net.9"]}


def dropping() -> nn.Module:
    """Return a network whose gradients depend on the random numbers; ε is large enough for cosines that differ."""
    torch.manual_seed(3)
    layers = list(ConvNet(eps=1e-4))
    return nn.Sequential(*layers[:8], nn.Dropout(0.25), *layers[8:])


class Automatic(Project):
    """Project with automatic optimization."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(lambda module: OPTIMIZERS[name](module.parameters(), **settings), dropping())
        self.optimizer = lambda parameters: OPTIMIZERS[name](parameters, **settings)


class Overflow:
    """Project whose gradients are infinite in the second step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if batch_idx == 1 else loss


class TwoByHand:
    """Project that steps two optimizers itself."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, *rest = self.net.parameters()
        return self.optimizer([first]), self.optimizer(rest)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()


class Overflowing(Overflow, Automatic):
    pass


class ByHand(TwoByHand, Automatic):
    pass


@cache
def compiled(dtype: torch.dtype) -> nn.Module:
    """Return one network for all cells with a compiled one: compiling takes longer than training."""
    net = dropping().to(dtype)
    net.compile(backend="aot_eager")
    return net


def half() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@dataclass
class Loop:
    """One way of taking steps."""

    settings: Callable[[], dict[str, Any]] = dict
    project: type[Automatic] = Automatic
    compiled: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    stepped: tuple[int, ...] = tuple(range(STEPS))
    names: list[str] = field(default_factory=lambda: list(OPTIMIZERS))
    wide: bool = True
    """Whether training in float64 makes a difference: autocast ignores it."""


UNSCALED = {"project": Overflowing, "settings": half, "stepped": (0, 2, 3)}

LOOPS: dict[str, Loop] = {
    "plain": Loop(),
    "clip-norm": Loop(lambda: {"gradient_clip_val": 0.05}),
    "clip-value": Loop(lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulate": Loop(lambda: {"accumulate_grad_batches": 2}),
    "scaler": Loop(**UNSCALED),
    "scaler-fused": Loop(**UNSCALED, options={"fused": True, "foreach": None}, names=FUSED),
    "bf16-mixed": Loop(lambda: {"precision": "bf16-mixed"}, wide=False),
    "compiled": Loop(compiled=True),
    "manual": Loop(lambda: {"max_steps": -1, "max_epochs": 1, "limit_train_batches": STEPS}, ByHand),
}

CELLS_OF_TWO = [
    *((name, "plain") for name in OPTIMIZERS),
    *(("adamw", loop) for loop in ("clip-norm", "clip-value", "accumulate", "bf16-mixed", "manual")),
]
"""Cells that are also trained by two processes."""


def train(name: str, way: Loop, *callbacks: Any, wide: bool = False, **settings: Any) -> Project:
    dtype = torch.float64 if wide else torch.float32
    project = way.project(name, **way.options).to(dtype)
    if way.compiled:
        compiled(dtype).load_state_dict(project.net.state_dict())
        compiled(dtype).zero_grad()
        project.net = compiled(dtype)
    torch.manual_seed(4)
    trainer(*callbacks, **{"steps": STEPS, **way.settings(), **settings}).fit(project, images(dtype=dtype))
    return project


def observe(name: str, way: Loop, wide: bool = False, **settings: Any) -> tuple[Rows, Account, Fingerprint]:
    account, rows, fingerprint = Account(way.project(name, **way.options)), Rows(), Fingerprint()
    monitors = [NormGrowthMonitor(layers="*", cumulative=True), OrthogonalityMonitor(layers="*")]
    train(name, way, account, *monitors, fingerprint, wide=wide, logger=rows, **settings)
    return rows, account, fingerprint


def assert_explained(rows: Rows, account: Account, steps: tuple[int, ...], wide: bool) -> None:
    """Check that the increment is that of the weights, and that the residual is rounding."""
    assert [step for step, metrics in rows.rows if "norm_growth/increment" in metrics] == list(steps)
    increments = account.increments()
    for step, metrics in rows.rows:
        for group, layers in SITES.items():
            truth = {f"/{layer}": increments[step][f"{layer}.weight"] for layer in layers}
            for suffix, increment in {"": sum(truth.values()), **truth}.items():
                if f"{group}/increment{suffix}" not in metrics:
                    continue  # a row of the other monitor
                norm = metrics[f"{group}/weight_norm{suffix}"]
                assert metrics[f"{group}/increment{suffix}"] == pytest.approx(increment, rel=1e-9, abs=1e-15 * norm**2)
                assert_at_the_floor(metrics, group, suffix, wide)
                assert_cumulative(metrics, group, suffix, increments[: step + 1])


def assert_at_the_floor(metrics: dict[str, float], group: str, suffix: str, wide: bool) -> None:
    """Check that the floor is of the size of rounding, and the residual below it."""
    size = sum(abs(metrics[f"{group}/term_{name}{suffix}"]) for name in IncrementTerms._fields)
    floor = metrics[f"{group}/storage_floor{suffix}"]
    assert floor <= (1e-14 if wide else 1e-6) * max(size, metrics[f"{group}/weight_norm{suffix}"] ** 2)
    residual = abs(metrics[f"{group}/residual{suffix}"])
    assert residual <= floor + (1e-12 * size if wide else 0), (group, suffix)


def assert_cumulative(metrics: dict[str, float], group: str, suffix: str, increments: list[dict[str, float]]) -> None:
    """Check the same for the sums over all steps so far."""
    layers = [suffix.strip("/")] if suffix else SITES[group]
    truth = sum(increment[f"{layer}.weight"] for increment in increments for layer in layers)
    rounding = 1e-15 * metrics[f"{group}/weight_norm{suffix}"] ** 2
    assert metrics[f"{group}/cumulative_increment{suffix}"] == pytest.approx(truth, rel=1e-9, abs=rounding)
    floor = metrics[f"{group}/cumulative_storage_floor{suffix}"]
    assert abs(metrics[f"{group}/cumulative_residual{suffix}"]) <= floor + rounding


def assert_cosines(rows: Rows, account: Account, steps: tuple[int, ...], tolerance: float = 1e-9) -> None:
    """Check that cosines are those of an independently computed gradient."""
    curves = rows.curves
    for group, layers in SITES.items():
        orthogonality = group.replace("norm_growth", "orthogonality")
        for layer in layers:
            largest, average = (dict(curves[f"{orthogonality}/{key}/{layer}"]) for key in ("max_abs_cos", "rms_cos"))
            assert list(largest) == list(average) == list(steps)
            for step in steps:
                cosines = account.cosines(step, f"{layer}.weight")
                assert largest[step] == pytest.approx(float(cosines.max()), rel=tolerance)
                assert average[step] == pytest.approx(float(cosines.square().mean().sqrt()), rel=tolerance)
    assert min(value for _, value in curves["orthogonality/max_abs_cos"]) > 1e-5, "ε is really there"
