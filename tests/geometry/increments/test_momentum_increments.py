"""Eq 16 under momentum: the increment predicted from ⟨W, g⟩ = 0, against float64 loops and in real Trainers."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_normgeo import NormGrowthMonitor
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.geometry.increments.momentum_increments import MomentumState, momentum_increment
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from support import reference as ref
from support.projects import ConvNet, Optimizers, Project, Resumed, Rows, images, sgd, trainer

STEPS = 30
CURVATURES = [[0.3, -1.2, 2.0, 0.7], [1.5, 0.2, -0.4, 0.9]]
STARTS = [[0.6, -0.8, 1.1, 0.4], [-0.3, 0.9, 0.2, -1.3]]
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "little-momentum": {"momentum": 1e-3},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "fully-dampened": {"momentum": 0.9, "dampening": 1.0},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.3},
    "momentum-decay": {"momentum": 0.8, "weight_decay": 0.2},
    "dampening-decay": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2},
    "nesterov-decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.2},
    "maximize": {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
    "maximize-nesterov": {"momentum": 0.9, "nesterov": True, "maximize": True, "weight_decay": 0.1},
}


def slope(w: list[float], curvature: list[float]) -> list[float]:
    """Return the gradient of Σ c x²/2 at x = w/‖w‖, which is scale invariant in w: the gradient is orthogonal to w."""
    length = math.sqrt(ref.dot(w, w))
    x = [v / length for v in w]
    along = [c * v for c, v in zip(curvature, x, strict=True)]
    radial = ref.dot(along, x)
    return [(a - radial * v) / length for a, v in zip(along, x, strict=True)]


class Twin:
    """One weight under SGD, computed by loops: its increments, and the prediction from norms alone."""

    def __init__(self, start: list[float], curvature: list[float], **rule: Any) -> None:
        self.w, self.curvature, self.b = start, curvature, None
        self.mu, self.tau = rule.get("momentum", 0.0), rule.get("dampening", 0.0)
        self.decay, self.nesterov = rule.get("weight_decay", 0.0), rule.get("nesterov", False)
        self.sign = -1.0 if rule.get("maximize") else 1.0
        self.inner = 0.0

    def step(self, lr: float) -> tuple[dict[str, float], float, float]:
        """Return the norms, the measured increment, and the recursion of ⟨W, b⟩ that reads no inner product."""
        w, g = self.w, slope(self.w, self.curvature)
        d = [self.sign * a + self.decay * b for a, b in zip(g, w, strict=True)]
        fresh = self.b is None or not self.mu
        share, before = (1.0, [0.0] * len(w)) if fresh else (1 - self.tau, self.b)
        b = [self.mu * old + share * new for old, new in zip(before, d, strict=True)]
        u = [new + self.mu * old for new, old in zip(d, b, strict=True)] if self.nesterov else b
        after = [x - lr * y for x, y in zip(w, u, strict=True)]
        norms = {"weight_sq": ref.dot(w, w), "gradient_sq": ref.dot(g, g), "direction_sq": ref.dot(u, u)}
        inner = (0.0 if fresh else self.mu * self.inner) + share * self.decay * norms["weight_sq"]
        radial = self.decay * norms["weight_sq"] + self.mu * inner if self.nesterov else inner
        followed = -2 * lr * radial + lr**2 * norms["direction_sq"]
        self.inner = inner - lr * ref.dot(u, b)
        self.w, self.b = after, b
        return norms, ref.increment(w, after), followed


def rates(lr: float) -> list[float]:
    """Return learning rates that drop twice, as in schedules, and are zero once."""
    return [lr * (0.1 if k >= 10 else 1) * (0.0 if k == 15 else 1) * (0.5 if k >= 20 else 1) for k in range(STEPS)]


@pytest.mark.parametrize("flags", RULES.values(), ids=RULES.keys())
def test_the_recursion_is_the_measured_increment(flags: dict[str, Any]) -> None:
    twins = [Twin(w, c, **flags) for w, c in zip(STARTS, CURVATURES, strict=True)]
    state = MomentumState(*torch.full((2, 2), torch.nan, dtype=torch.float64))  # not used before there is a buffer
    first = True
    for lr in rates(0.4):
        norms, measured, followed = zip(*(twin.step(lr) for twin in twins), strict=True)
        read = {key: torch.tensor([one[key] for one in norms], dtype=torch.float64) for key in norms[0]}
        read["direction_sq"] = None if first else read["direction_sq"]
        rule = SGDRule(lr=lr, first=first or not flags.get("momentum"), **flags)
        found, state = momentum_increment(rule, **read, state=state)
        for value, truth, law, one in zip(found.tolist(), measured, followed, norms, strict=True):
            # increments may cancel, so compare relative to the added terms
            size = lr**2 * one["direction_sq"] + 2 * lr * math.sqrt(one["weight_sq"] * one["direction_sq"])
            assert law == pytest.approx(truth, rel=1e-10, abs=1e-12 * size)
            assert value == pytest.approx(truth, rel=1e-10, abs=1e-11 * size)
        first = False
    if flags.get("momentum"):
        for twin, inner, square in zip(twins, state.inner.tolist(), state.square.tolist(), strict=True):
            assert inner == pytest.approx(ref.dot(twin.w, twin.b), rel=1e-9, abs=1e-12)
            assert square == pytest.approx(ref.dot(twin.b, twin.b), rel=1e-9)
    else:
        assert not any(value.any() for value in state)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    lr=st.floats(1e-3, 2),
    momentum=st.floats(0.01, 0.999),
    dampening=st.floats(0, 1),
    weight_decay=st.floats(0, 0.5),
    nesterov=st.booleans(),
    maximize=st.booleans(),
)
def test_the_recursion_holds_for_any_settings(nesterov: bool, **flags: Any) -> None:
    lr = flags.pop("lr")
    flags |= {"nesterov": nesterov} | ({"dampening": 0.0} if nesterov else {})
    twin = Twin(STARTS[0], CURVATURES[0], **flags)
    state, total = MomentumState(*torch.zeros(2, 1, dtype=torch.float64)), 0.0
    for k in range(8):
        norms, measured, _ = twin.step(lr)
        read = {key: torch.tensor([value], dtype=torch.float64) for key, value in norms.items()}
        found, state = momentum_increment(SGDRule(lr=lr, first=k == 0, **flags), **read, state=state)
        total += lr**2 * norms["direction_sq"] + 2 * lr * math.sqrt(norms["weight_sq"] * norms["direction_sq"])
        assert float(found) == pytest.approx(measured, rel=1e-9, abs=1e-11 * total)


@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_without_decay_the_increments_are_sums_of_squares(mu: float) -> None:
    """In closed form: η²‖b_k‖² + 2η² Σ μ^{k-j} ‖b_j‖², never negative."""
    twin, lr, squares = Twin(STARTS[0], CURVATURES[0], momentum=mu), 0.3, []
    for k in range(STEPS):
        _, measured, _ = twin.step(lr)
        squares.append(ref.dot(twin.b, twin.b))
        closed = squares[k] + 2 * sum(mu ** (k - j) * squares[j] for j in range(k))
        assert measured == pytest.approx(lr**2 * closed, rel=1e-9, abs=1e-14)
        assert closed > 0


@pytest.mark.parametrize("flags", RULES.values(), ids=RULES.keys())
def test_torch_follows_it_too(flags: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.tensor(STARTS[0], dtype=torch.float64))
    curvature = torch.tensor(CURVATURES[0], dtype=torch.float64)
    optimizer, twin = torch.optim.SGD([weight], lr=0.2, **flags), Twin(STARTS[0], CURVATURES[0], **flags)
    for lr in rates(0.2):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        ((curvature * (weight / weight.norm()).square()).sum() / 2).backward()
        optimizer.step()
        twin.step(lr)
        assert weight.tolist() == pytest.approx(twin.w, rel=1e-10)


# In Trainers

GROWTH = ("norm_growth/increment", "norm_growth/predicted_momentum")
SUMS = ("norm_growth/cumulative_increment", "norm_growth/cumulative_predicted_momentum")


def dropping(**flags: Any) -> Optimizers:
    """Return SGD whose learning rate drops in every fourth step."""

    def make(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), **{"lr": 0.2, **flags})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.3)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return make


def one_cycle(module: nn.Module) -> Any:
    """Change the learning rate and the momentum in every step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=40)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def grow(optimizers: Optimizers, every: int = 1, steps: int = 12, **settings: Any) -> Rows:
    """Train a network with a negligible ε, in float64."""
    torch.manual_seed(1)
    rows = Rows()
    project = Project(optimizers, settings.pop("net", None) or ConvNet(eps=1e-40)).double()
    monitor = NormGrowthMonitor(every, layers="*", cumulative=True)
    trainer(monitor, steps=steps, logger=rows, **settings).fit(project, images(160, dtype=torch.float64))
    return rows


def agree(metrics: dict[str, float], pair: tuple[str, str], suffix: str = "") -> None:
    measured, followed = (metrics[f"{key}{suffix}"] for key in pair)
    size = sum(abs(v) for k, v in metrics.items() if k.startswith(f"{pair[0].rpartition('/')[0]}/") and "term_" in k)
    assert followed == pytest.approx(measured, rel=1e-9, abs=1e-12 * size)


TRAINED: dict[str, Optimizers] = {
    **{name: dropping(**flags) for name, flags in RULES.items() if flags and "maximize" not in name},
    "one-cycle": one_cycle,
    "foreach": dropping(momentum=0.9, weight_decay=0.02, foreach=True),
    "fused": dropping(momentum=0.9, nesterov=True, fused=True),
}


@pytest.mark.parametrize("name", TRAINED)
def test_in_a_trainer_it_is_what_was_measured(name: str) -> None:
    for _, metrics in grow(TRAINED[name]).rows:
        for suffix in ("", "/net.0", "/net.3"):
            agree(metrics, GROWTH, suffix)
            agree(metrics, SUMS, suffix)


def test_steps_that_are_not_measured_are_followed() -> None:
    rows = grow(dropping(momentum=0.9, weight_decay=0.05), every=6, steps=24, accumulate_grad_batches=2)
    assert rows.steps == [5, 11, 17, 23]
    for _, metrics in rows.rows:
        agree(metrics, SUMS)


def test_plain_sgd_needs_no_form_of_its_own() -> None:
    metrics = grow(sgd(lr=0.2)).rows[-1][1]
    assert "norm_growth/predicted_momentum" not in metrics
    agree(metrics, SUMS)
    assert metrics["norm_growth/cumulative_predicted"] == pytest.approx(metrics[SUMS[1]], rel=1e-12)


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "NAdam"])
def test_it_is_about_sgd_alone(name: str) -> None:
    metrics = grow(lambda module: getattr(torch.optim, name)(module.parameters(), lr=0.01), steps=2).rows[-1][1]
    assert "norm_growth/cumulative_explained" in metrics
    assert not [key for key in metrics if "predicted_momentum" in key]


def resumed(folder: Path, first: bool, then: bool) -> list[dict[str, float]]:
    """Train for six steps, then resume up to the fourteenth; with or without sums."""
    rows = Rows()
    for steps, cumulative in ((6, first), (14, then)):
        torch.manual_seed(1)
        project = Project(dropping(momentum=0.9, weight_decay=0.05), ConvNet(eps=1e-40)).double()
        monitor = NormGrowthMonitor(2, layers="*", cumulative=cumulative)
        run = trainer(monitor, steps=steps, logger=rows)
        data = images(64, dtype=torch.float64) if steps == 6 else Resumed64()
        run.fit(project, data, ckpt_path=folder / "6.ckpt" if steps > 6 else None)
        run.save_checkpoint(folder / f"{steps}.ckpt")
    return [metrics for step, metrics in rows.rows if step >= 6]


class Resumed64(Resumed):
    def __iter__(self) -> Any:
        return ([x.double(), y] for x, y in super().__iter__())


@pytest.mark.parametrize("first", [True, False], ids=["with-sums", "without-sums"])
def test_it_goes_on_after_a_checkpoint(first: bool, tmp_path: Path) -> None:
    """If the checkpoint has no sums, counting begins with momentum buffers that already exist."""
    said = (
        nullcontext() if first else pytest.warns(MeasurementWarning, match=r"cumulative_… keys count from step \d+ on")
    )
    with said:
        found = resumed(tmp_path, first, then=True)
    assert len(found) == 4
    for metrics in found:
        for suffix in ("", "/net.0", "/net.3"):
            agree(metrics, SUMS, suffix)
            agree(metrics, GROWTH, suffix)


def test_weights_that_rest_keep_their_momentum() -> None:
    class Pausing(Project):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].weight.requires_grad_(batch_idx % 4 < 2)

    rows = Rows()
    project = Pausing(sgd(momentum=0.9, weight_decay=0.05), ConvNet(eps=1e-40)).double()
    monitor = NormGrowthMonitor(1, layers="*", cumulative=True)
    trainer(monitor, steps=12, logger=rows).fit(project, images(160, dtype=torch.float64))
    for _, metrics in rows.rows:
        agree(metrics, SUMS, "/net.0")


def joint(eps: float = 1e-40) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GroupNorm(2, 6, eps=eps),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def test_units_of_weight_and_bias_follow_it_jointly() -> None:
    for _, metrics in grow(dropping(momentum=0.9, weight_decay=0.05), net=joint()).rows:
        agree(metrics, GROWTH)
        agree(metrics, SUMS)


APART: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rates": ({"lr": 0.1}, {"lr": 0.3}),
    "decay": ({"weight_decay": 0.0}, {"weight_decay": 0.1}),
    "momentum": ({"momentum": 0.0}, {"momentum": 0.9}),
    "rates-momentum": ({"lr": 0.1, "momentum": 0.9}, {"lr": 0.3, "momentum": 0.9}),
    "no-decay-of-biases": ({"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9}),
}


@pytest.mark.parametrize("name", APART)
def test_units_whose_weight_and_bias_move_apart_claim_nothing(name: str) -> None:
    """⟨W, g⟩ + ⟨b, g⟩ = 0 says nothing about the increment if both have different update rules."""
    first, second = APART[name]

    def make(module: nn.Module) -> Any:
        weights = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim == 1]
        return torch.optim.SGD([{"params": weights, **first}, {"params": others, **second}], lr=0.1)

    for _, metrics in grow(make, net=joint(), steps=4).rows:
        assert metrics["norm_growth/eq16_applies"] == 0
        assert "norm_growth/predicted_momentum" not in metrics
        assert SUMS[1] not in metrics
        assert metrics["norm_growth/cumulative_explained"] == pytest.approx(metrics[SUMS[0]], rel=1e-9)
