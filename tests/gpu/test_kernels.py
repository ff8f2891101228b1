"""Kernels on a GPU against sums in float64, transfers and memory of a measured step, and torch's fused optimizers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, SymmetryMonitor
from lightning_normgeo.geometry import IncrementTerms, norm_increment, update_products
from lightning_normgeo.geometry.increments.norm_increments import measured_increment
from lightning_normgeo.geometry.increments.rounding_floors import storage_floor, systematic_floor
from lightning_normgeo.geometry.products import compiled, one_pass
from lightning_normgeo.geometry.products.weight_pass import WeightPass
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from lightning_normgeo.geometry.update_rules.registry import described_safely
from support.gpu import DEVICE, EMULATED, on_gpu
from support.gpu_trainings import Setting, sgd, train

pytestmark = on_gpu
SHAPES = [(64, 147), (512, 4608), (2048, 512), (10, 2048), (1, 3_000_000), (16, 1), (7, 9)]
SHAPES = [(3, 147), (2, 9000), (4, 1), (1, 17)] if EMULATED else SHAPES
STEP = {"float": 7.0, "wide": torch.float64, "narrow": torch.float32}


def rule_of(kind: str) -> Any:
    if kind == "none":
        return None
    if kind == "sgd":
        return SGDRule(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05, maximize=True, first=False)
    step = STEP[kind]
    on_device = torch.tensor(7.0, dtype=step, device=DEVICE) if isinstance(step, torch.dtype) else step
    return AdamRule(lr=1e-3, weight_decay=0.1, betas=(0.8, 0.99), step=on_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["none", "sgd", *STEP])
def test_sums_of_many_weights(kind: str, scaled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, states = rule_of(kind), {"none": 0, "sgd": 1}.get(kind, 2)
    scale = torch.tensor(1024.0, device=DEVICE) if scaled else None
    passes = []
    for shape in SHAPES:
        weight, gradient, mean, square = torch.randn(4, *shape, device=DEVICE).to(dtype).unbind()
        keep = torch.full_like(weight, torch.nan)
        passes.append(WeightPass(weight, gradient, (mean, square.abs())[:states], rule, scale, keep))
    slow = [one_pass._by_torch(one._replace(keep=None)) for one in passes]
    with monkeypatch.context() as patch:
        patch.setattr(one_pass, "_by_torch", None)
        found = one_pass.many_weight_products(passes)
        again = one_pass.many_weight_products(passes)
    for one, a, b, c in zip(passes, found, slow, again, strict=True):
        assert torch.equal(one.keep, one.weight)
        for x, y, z in zip(a.sums, b.sums, c.sums, strict=True):
            assert torch.equal(x, z), "not deterministic"
            size = y.abs().amax().clamp_min(1e-30)
            assert ((x - y).abs() / size).amax() < 1e-11
    assert "triton_launches" not in compiled._failed


@pytest.mark.parametrize("turn", [1e-9, 1e-3, 1.0])
def test_updates_of_many_weights(turn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(shape, device=DEVICE, dtype=torch.float64) for shape in SHAPES]
    slow = [update_products(w.cpu(), (1.25 * w + turn * w.roll(1, 1)).cpu()) for w in weights]
    monkeypatch.setattr("lightning_normgeo.geometry.steps.angles._by_torch", None)
    monkeypatch.setattr(compiled, "_WORTHWHILE", 0)
    for weight, expected in zip(weights, slow, strict=True):
        found = update_products(weight, 1.25 * weight + turn * weight.roll(1, 1))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-6 if turn < 1e-6 else 1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bounds_of_rounding(dtype: torch.dtype) -> None:
    from lightning_normgeo.geometry.products import triton_launches

    columns = torch.randn(5, 3001, dtype=torch.float64) * 10.0 ** torch.randint(-14, 2, (5, 3001))
    columns[3:] = columns[3:].abs()
    expected = systematic_floor(IncrementTerms(*columns[:4]), columns[4], dtype)
    found = triton_launches.rounding_bounds(list(columns[:4].to(DEVICE)), columns[4].to(DEVICE), dtype)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-13, atol=0.0)


def test_a_gradient_that_is_not_finite_shows() -> None:
    weight, gradient = torch.randn(2, 5, 80_000, device=DEVICE).unbind()
    gradient[3, 77_777] = torch.inf
    found = one_pass.weight_products(weight, gradient, rule=AdamRule(lr=1e-3))
    assert found.gradient_sq.isfinite().tolist() == [True, True, True, False, True]


ELEMENTS = 4_000 if EMULATED else 4_000_000
OPTIMIZERS = {
    "adamw fused": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, fused=True),
    "adam fused": lambda p, lr, wd: torch.optim.Adam(p, lr=lr, weight_decay=wd, fused=True),
    "adamw foreach": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, foreach=True),
    "capturable": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, capturable=not EMULATED),
    "sgd fused": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd, momentum=0.9, fused=True),
}


@pytest.mark.parametrize(("lr", "decay"), [(1e-3, 0.01), (3e-4, 0.01), (3e-4, 0.05), (1e-4, 0.1)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_formulas_are_those_of_torchs_kernels(name: str, lr: float, decay: float) -> None:
    """Four million elements of one unit: an error of 1e-5 of the step is far above the floor."""
    torch.manual_seed(0)
    parameter = nn.Parameter(0.02 * torch.randn(1, ELEMENTS, device=DEVICE))
    optimizer = OPTIMIZERS[name]([parameter], lr, decay)
    for step in range(7):
        parameter.grad, before = 1e-3 * torch.randn_like(parameter), parameter.detach().clone()
        described = described_safely(
            optimizer, optimizer.param_groups[0], optimizer.state.get(parameter, {}), parameter
        )
        assert described is not None
        rule, state = described
        terms = norm_increment(rule, before, parameter.grad, *(one.clone() for one in state))
        optimizer.step()
        update = update_products(before, parameter.detach())
        residual = measured_increment(update.weight_update, update.update_sq) - terms.total
        floor = storage_floor(before.double().pow(4).sum(1), torch.float32, rule.stores)
        floor += systematic_floor(terms, update.weight_sq, torch.float32)
        print(f"{name} {lr:g} {decay:g}: step {step}, residual {residual.item():+.1e}, {(residual / floor).item():.2f}")
        assert residual.abs() <= floor


@pytest.mark.parametrize("more", [(), (SymmetryMonitor,)], ids=["three monitors", "symmetries too"])
def test_a_measured_step_waits_once_and_others_never(more: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[list[str]] = []

    class Debug(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("warn")
            self.caught = warnings.catch_warnings(record=True)
            self.said = self.caught.__enter__()
            warnings.simplefilter("always")

        def on_train_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            waits.append([w.filename for w in self.said if "synchroniz" in str(w.message).lower()])

    train(
        Setting(sgd(fused=True)),
        [OrthogonalityMonitor(3), NormGrowthMonitor(3), *(kind(3) for kind in more), Debug()],
        steps=9,
    )
    own = [sum("lightning_normgeo" in filename for filename in step) for step in waits]
    assert [own[k] for k in (3, 4, 6, 7)] == [0, 0, 0, 0]
    assert max(own[5], own[8]) <= 1


def test_memory_of_a_measured_step_is_one_copy_and_a_little() -> None:
    rows, width = 8 if EMULATED else 30_000, 1024  # 123 MB
    weight, gradient, buffer = torch.randn(3, rows, width, device=DEVICE).unbind()
    rule, keep = SGDRule(lr=0.1, momentum=0.9, first=False), torch.empty_like(weight)
    one = WeightPass(weight, gradient, (buffer,), rule, None, keep)
    for read, limit in ((lambda: one_pass.many_weight_products([one]), 8), (lambda: one_pass._by_torch(one), 70)):
        read()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        read()
        assert (torch.cuda.max_memory_allocated() - held) / 2**20 < limit
