"""The step probe sees W, the gradient really applied, η and W⁺, however Lightning takes its steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep
from lightning_normgeo.probes import step_probe
from support.projects import Account, Optimizers, Project, Rows, images, sgd, trainer


class Spy(NormGrowthMonitor):
    """Records the probe's results beside an independent measurement of the same step."""

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__(every_n_steps)
        self.seen: list[dict[str, Any]] = []

    def measure(self, measured: MeasuredStep) -> Iterator[Any]:
        self.seen.append({step.units.name: step for step in measured.steps})
        yield from super().measure(measured)


class Manual(Project):
    """Two optimizers stepped by hand."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw

    def configure_optimizers(self) -> Any:
        first, *rest = (list(layer.parameters()) for layer in self.net)
        second = [parameter for parameters in rest for parameter in parameters]
        return torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.AdamW(second, lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizers = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


class Wrapped(torch.optim.SGD):
    """An optimizer whose step calls its parent's, so that torch runs the step hooks twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def adam(kind: Any, **settings: Any) -> Optimizers:
    return lambda module: kind(module.parameters(), lr=0.01, **settings)


def schedule(module: nn.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]


OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": sgd(),
    "momentum-dampening": sgd(momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": sgd(momentum=0.9, nesterov=True, foreach=True),
    "maximize": sgd(maximize=True, weight_decay=0.01),
    "scheduled": schedule,
    "adam": adam(torch.optim.Adam, weight_decay=0.01),
    "amsgrad": adam(torch.optim.Adam, amsgrad=True),
    "adamw": adam(torch.optim.AdamW, weight_decay=0.1),
    "adamw-fused": adam(torch.optim.AdamW, fused=True),
    "tensor-lr": lambda module: torch.optim.SGD(module.parameters(), lr=torch.tensor(0.1)),
}
LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip-norm": {"gradient_clip_val": 0.01},
    "clip-value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


def observe(project: Project, steps: int = 4, **settings: Any) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    spy, account = Spy(), Account()
    trainer(account, spy, steps=steps, **settings).fit(project, images(160))
    return spy.seen, account.increments()


def check(seen: list[dict[str, Any]], increments: list[dict[str, float]], exact: bool) -> None:
    for steps, truth in zip(seen, increments, strict=True):
        assert set(steps) == {"net.0.weight", "net.3.weight", "net.8.weight"}
        for name, step in steps.items():
            measured = float((2 * step.update.weight_update + step.update.update_sq).sum())
            explained = float(step.terms.total.sum())
            scale = float(step.weight_sq.sum())
            assert measured == pytest.approx(truth[name], rel=1e-9, abs=1e-12 * scale)
            floor = 4 * torch.finfo(step.dtype).eps / 2 * float(step.quartic.sum().sqrt())
            sizes = sum(float(term.abs().sum()) for term in step.terms)
            slack = 1e-12 * sizes if exact else 1e-6 * sizes
            assert abs(measured - explained) <= floor + slack, name


def check_unexplained(steps: dict[str, Any], truth: dict[str, float]) -> None:
    """Check that a step without a known formula is measured all the same."""
    assert steps
    for name, step in steps.items():
        assert step.terms is None
        measured = float((2 * step.update.weight_update + step.update.update_sq).sum())
        assert measured == pytest.approx(truth[name], rel=1e-9, abs=1e-12 * float(step.weight_sq.sum()))


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize("optimizers", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_every_term_is_explained(optimizers: Optimizers, loop: dict[str, Any], precision: str) -> None:
    fused = getattr(optimizers(nn.Linear(1, 1)), "defaults", {}).get("fused")
    if fused and loop:
        return  # Lightning itself refuses to clip fused optimizers
    seen, increments = observe(Project(optimizers), precision=precision, **loop)
    assert len(seen) == 4
    check(seen, increments, exact=precision == "64-true")


@pytest.mark.parametrize("raw", [False, True], ids=["lightning-optimizer", "raw-optimizer"])
def test_manual_optimization_with_two_optimizers(raw: bool) -> None:
    spy, account = Spy(), Account()
    project = Manual(raw)
    trainer(account, spy, steps=-1, max_epochs=1).fit(project, images(32))
    assert len(spy.seen) == 4
    check(spy.seen, account.increments(), exact=False)


def test_accumulation_is_one_step_with_the_mean_gradient() -> None:
    spy = Spy()
    project = Project(sgd())
    before = project.net[0].weight.detach().double().clone()
    trainer(spy, steps=1, accumulate_grad_batches=2).fit(project, images(32))
    change = project.net[0].weight.detach().double() - before
    (steps,) = spy.seen
    assert float(steps["net.0.weight"].gradient_sq.sum()) == pytest.approx(
        float(change.square().sum() / 0.01), rel=1e-4
    )


def test_optimizers_that_call_their_parent_are_seen_once() -> None:
    seen, increments = observe(Project(lambda m: Wrapped(m.parameters(), lr=0.1)))
    for steps, truth in zip(seen, increments, strict=True):
        check_unexplained(steps, truth)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_grad_scaler_sees_unscaled_gradients_and_leaves_out_skipped_steps(fused: bool) -> None:
    class Overflowing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 1 else loss

    account, rows = Account(), Rows()
    project = Overflowing(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, fused=fused))
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = NormGrowthMonitor()
    trainer(account, monitor, logger=rows, plugins=[MixedPrecision("16-mixed", "cpu", grad_scaler)]).fit(
        project, images(64)
    )
    assert rows.steps == [0, 2, 3]
    truth = account.increments()
    for step, metrics in rows.rows:
        total = sum(truth[step][name] for name in ("net.0.weight", "net.3.weight"))
        assert metrics["norm_growth/increment"] == pytest.approx(total, rel=1e-6)
        assert metrics["norm_growth/residual"] == pytest.approx(0, abs=metrics["norm_growth/storage_floor"])


def test_closures_called_several_times_leave_out_what_one_gradient_explains() -> None:
    spy, account, rows = Spy(), Account(), Rows()
    with pytest.warns(UserWarning, match="left out because the optimizer evaluates its closure several times"):
        trainer(account, spy, steps=2, logger=rows).fit(
            Project(lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3)), images(32)
        )
    for steps, truth in zip(spy.seen, account.increments(), strict=True):
        assert set(steps) == {"net.0.weight", "net.3.weight", "net.8.weight"}
        check_unexplained(steps, truth)
        assert all(step.has_gradient for step in steps.values())
    assert spy.left_out == {"the optimizer evaluates its closure several times": 2}
    assert not [key for key in rows.curves if "explained" in key or "residual" in key or "term" in key]


def test_a_skipped_step_leaves_the_others_as_they_were() -> None:
    """After a skipped step the probe is inactive, and the next measured step does not inherit its data."""

    class Overflowing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 3 else loss

    rows, skipping = Rows(), Rows()
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    settings: dict[str, Any] = {"plugins": [MixedPrecision("16-mixed", "cpu", grad_scaler)], "steps": 12}
    spy = Spy(every_n_steps=4)
    trainer(spy, OrthogonalityMonitor(2), logger=rows, **settings).fit(Project(), images(160))
    other = Spy(every_n_steps=4)
    trainer(other, OrthogonalityMonitor(2), logger=skipping, **settings).fit(Overflowing(), images(160))
    assert rows.steps == [1, 3, 5, 7, 9, 11]
    assert skipping.steps == [1, 4, 5, 7, 9, 11], "what is due is measured at the next step"
    expected = {**dict(rows.rows), 4: dict(rows.rows)[3]}
    assert all(metrics.keys() == expected[step].keys() for step, metrics in skipping.rows)
    assert len(other.seen) == len(spy.seen)
    assert not other.left_out


def test_a_step_that_is_captured_in_a_cuda_graph_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed then becomes a part of the graph, and is computed again whenever that is replayed."""
    batches = iter([False, True, False, True])
    monkeypatch.setattr(step_probe, "is_captured", lambda: next(batches))
    spy = Spy()
    trainer(spy, NormGrowthMonitor(1, cumulative=True), steps=4).fit(Project(), images(32))
    assert [len(steps) for steps in spy.seen] == [3, 3]
    assert spy.left_out["it was captured in a CUDA graph"] == 2


def test_adamw_is_explained_down_to_the_rounding_of_its_decay() -> None:
    """float32(1 - ηλ) shrinks every element in the same direction, which adds up over a large layer."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4096), nn.BatchNorm1d(4096), nn.Linear(4096, 4))
    spy = Spy()
    trainer(spy, steps=2).fit(
        Project(lambda m: torch.optim.AdamW(m.parameters(), 3e-4, weight_decay=0.1), net), images(16)
    )
    for steps in spy.seen:
        step = steps["net.1.weight"]
        residual = (2 * step.update.weight_update + step.update.update_sq - step.terms.total).sum()
        assert abs(float(residual)) <= 4 * torch.finfo(torch.float32).eps / 2 * float(step.quartic.sum().sqrt())


def test_steps_with_arguments_of_their_own_are_left_alone() -> None:
    class ScaleState(torch.optim.SGD):
        def step(self, scale: float = 1.0) -> None:  # type: ignore[override]
            assert scale == 2.0
            super().step()

    class Manual2(Project):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step(2.0)

    spy = Spy()
    trainer(spy, steps=-1, max_epochs=1).fit(Manual2(lambda m: ScaleState(m.parameters(), lr=0.1)), images(16))
    assert [len(steps) for steps in spy.seen] == [3, 3]


def test_gradients_from_elsewhere_are_said_to_be_missing() -> None:
    class Raw(Project):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            nn.functional.cross_entropy(self(batch[0]), batch[1]).backward()
            optimizer.step()

    spy, account = Spy(), Account()
    with pytest.warns(UserWarning, match=r"3 weights are controls.*no backward pass of Lightning's.*manual_backward"):
        trainer(account, spy, steps=-1, max_epochs=1).fit(Raw(), images(16))
    for steps, truth in zip(spy.seen, account.increments(), strict=True):
        assert {step.units.kind for step in steps.values()} == {"none"}
        for name, step in steps.items():
            measured = float((2 * step.update.weight_update + step.update.update_sq).sum())
            assert measured == pytest.approx(truth[name], rel=1e-9)


def test_swa_statistics_refresh_is_no_step() -> None:
    spy = Spy()
    swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    fit = trainer(swa, spy, steps=-1, max_epochs=3)
    fit.fit(Project(), images(32))
    assert len([steps for steps in spy.seen if steps]) == 3 * 4


def unknown(kind: Any) -> Any:
    """Return an optimizer that is not registered and has its own step."""

    def step(self: Any, closure: Any = None) -> Any:
        return kind.step(self, closure)

    return type(f"My{kind.__name__}", (kind,), {"step": step})


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adadelta])
def test_unknown_optimizers_get_what_needs_no_formula(kind: Any) -> None:
    seen, increments = observe(Project(adam(unknown(kind))))
    for steps, truth in zip(seen, increments, strict=True):
        check_unexplained(steps, truth)
