"""Observing changes nothing: with and without callbacks, everything is equal bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision

from lightning_normgeo import (
    AffineConvergenceMonitor,
    BatchGeometryMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    RobustnessEvaluation,
    SymmetryMonitor,
)
from support.projects import Project, images, sgd, trainer


class Fingerprint(pl.Callback):
    """State after each batch: everything that a run changes, and the state of the random numbers."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.states.append((torch.get_rng_state().clone(), *self.everything(trainer, pl_module)))

    @staticmethod
    def everything(trainer: Any, module: Any) -> tuple[Any, ...]:
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
        flags = {n: (m.training, len(m._forward_hooks)) for n, m in module.named_modules()}
        weights = {n: t.clone() for n, t in module.state_dict().items()}
        return weights, gradients, flags, copy.deepcopy([o.state_dict() for o in trainer.optimizers])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def adamw(module: Any) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=True)


def with_schedule(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def scaler() -> dict[str, Any]:
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", grad_scaler)]}


CASES: dict[str, tuple[Any, Any]] = {
    "sgd": (sgd(), dict),
    "nesterov-foreach": (sgd(momentum=0.9, nesterov=True, foreach=True), dict),
    "adamw-foreach": (adamw, dict),
    "clip-norm-and-schedule": (with_schedule, lambda: {"gradient_clip_val": 0.01}),
    "clip-value": (sgd(), lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulate": (sgd(momentum=0.9), lambda: {"accumulate_grad_batches": 2}),
    "bf16-mixed": (sgd(), lambda: {"precision": "bf16-mixed"}),
    "grad-scaler": (sgd(), scaler),
    "float64": (sgd(weight_decay=0.1), lambda: {"precision": "64-true"}),
}


class WithTestData(Project):
    def test_dataloader(self) -> Any:
        return images(16)


def run(observed: bool, optimizers: Any, settings: dict[str, Any], folder: Any) -> Fingerprint:
    pl.seed_everything(3)
    fingerprint = Fingerprint()
    monitors = [
        OrthogonalityMonitor(layers="*"),
        NormGrowthMonitor(every_n_steps=2),
        AffineConvergenceMonitor(),
        SymmetryMonitor(every_n_steps=3),
        BatchGeometryMonitor(every_n_steps=2, layers="*", exact_up_to=30),  # one layer exactly, others with probes
        RobustnessEvaluation(after_fit=True, steps=2),
    ]
    logger = RecordLogger(str(folder)) if observed else False
    project = WithTestData(optimizers)
    fit = trainer(*(monitors if observed else []), fingerprint, steps=20, logger=logger, **settings)
    fit.fit(project, images(160))
    fingerprint.states.append((torch.get_rng_state(), *Fingerprint.everything(fit, project)))
    return fingerprint


@pytest.mark.parametrize(("optimizers", "settings"), CASES.values(), ids=CASES.keys())
def test_twenty_steps_are_bit_identical(optimizers: Any, settings: Any, tmp_path: Any) -> None:
    plain = run(False, optimizers, settings(), tmp_path)
    observed = run(True, optimizers, settings(), tmp_path)
    assert len(plain.states) == len(observed.states) > 10
    for step, (a, b) in enumerate(zip(plain.states, observed.states, strict=True)):
        assert same(a, b), f"differs after batch {step}"


def test_the_fingerprint_notices_a_change(tmp_path: Any) -> None:
    plain = run(False, sgd(), {}, tmp_path)
    other = run(False, sgd(lr=0.1 + 1e-6), {}, tmp_path)
    assert not same(plain.states, other.states)
