"""Console lines at the start and end of a training with monitors, also if little or nothing was measured."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor, RecordLogger
from lightning_normgeo.errors import MeasurementWarning
from support.projects import OPTIMIZERS, ConvNet, Project, Rows, images, sgd, trainer


def said(caplog: Any, project: Any, *monitors: Any, steps: int = 4, **settings: Any) -> tuple[str, str, list[str]]:
    """Train; return the line at the start, the line at the end, and all warnings of this package."""
    caplog.set_level(logging.INFO)
    caplog.clear()
    run = trainer(*monitors, steps=steps, **{"logger": Rows(), **settings})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.fit(project, images())
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("normgeo ")]
    assert len(lines) == 2, lines
    return (*lines, [str(one.message) for one in seen if one.category is MeasurementWarning])


def test_a_usual_run(caplog: Any) -> None:
    monitors = [OrthogonalityMonitor(2), NormGrowthMonitor(2), AffineConvergenceMonitor(3)]
    first, last, warned = said(caplog, Project(), *monitors, steps=6)
    assert first == (
        "normgeo measures orthogonality, norm_growth every 2 steps; affine every 3 steps. "
        "3 weights (SGD), 2 batch normalizations. Results go to Rows."
    )
    assert last == "normgeo measured 4 of 6 optimizer steps, 4 rows logged."
    assert not warned


def test_the_default_cadence_is_that_of_the_trainer(caplog: Any) -> None:
    first, last, _ = said(caplog, Project(), NormGrowthMonitor(), steps=8, log_every_n_steps=4)
    assert first.startswith("normgeo measures norm_growth every 4 steps. ")
    assert last.startswith("normgeo measured 2 of 8 optimizer steps, 2 rows")


def test_what_nobody_looks_at_is_not_counted(caplog: Any) -> None:
    first, _, _ = said(caplog, Project(), NormGrowthMonitor())
    assert first == "normgeo measures norm_growth every step. 3 weights (SGD). Results go to Rows."
    first, _, _ = said(caplog, Project(net=ConvNet()), AffineConvergenceMonitor())
    assert "3 weights (SGD), 2 batch normalizations. " in first


def test_no_logger(caplog: Any) -> None:
    first, _, _ = said(caplog, Project(), NormGrowthMonitor(), logger=False)
    assert first.endswith("Results go to trainer.callback_metrics alone: the Trainer has no logger.")
    assert "every step" in first


def test_several_loggers(caplog: Any, tmp_path: Any) -> None:
    loggers = [Rows(), RecordLogger(str(tmp_path))]
    first, _, _ = said(caplog, Project(), NormGrowthMonitor(), logger=loggers)
    assert first.endswith("Results go to Rows, RecordLogger.")


@pytest.mark.parametrize(("mode", "places"), [("disabled", "Rows"), ("offline", "Rows, WandbLogger")])
def test_wandb_is_named_unless_it_is_disabled(
    mode: str, places: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    first, _, _ = said(caplog, Project(), NormGrowthMonitor(), logger=[Rows(), type("WandbLogger", (Rows,), {})()])
    assert first.endswith(f"Results go to {places}.")


class Two(Project):
    """Two optimizers, the second of which steps in every second batch."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, *rest = self.net.parameters()
        return torch.optim.SGD([first], lr=0.05), torch.optim.AdamW(rest, lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        first.step()
        if batch_idx % 2:
            second.step()


def test_several_optimizers(caplog: Any) -> None:
    first, last, warned = said(caplog, Two(), NormGrowthMonitor(2), steps=-1, max_epochs=1)
    assert "3 weights (SGD, AdamW)" in first
    assert last == "normgeo measured 8 of 12 optimizer steps (SGD 4 of 8, AdamW 4 of 4), 4 rows logged."
    assert not warned


def test_accumulation_counts_steps_and_no_batches(caplog: Any) -> None:
    settings = {"steps": -1, "max_epochs": 1, "accumulate_grad_batches": 3}
    _, last, warned = said(caplog, Project(), NormGrowthMonitor(1), **settings)
    assert last == "normgeo measured 3 of 3 optimizer steps, 3 rows logged."
    assert not warned


def test_a_cadence_of_zero(caplog: Any) -> None:
    first, last, warned = said(caplog, Project(), NormGrowthMonitor(), log_every_n_steps=0)
    assert "norm_growth never, since log_every_n_steps is 0 (give the monitor an every_n_steps)" in first
    assert last == "normgeo measured 0 of 4 optimizer steps, 0 rows logged."
    assert not warned, "who asks for nothing gets nothing"


@pytest.mark.parametrize(
    "settings",
    [{"steps": 4}, {"steps": -1, "max_epochs": 1}, {"steps": -1, "max_epochs": 2, "limit_train_batches": 3}],
    ids=["steps", "epochs", "batches"],
)
def test_a_cadence_above_the_run(caplog: Any, settings: dict[str, Any]) -> None:
    first, last, warned = said(caplog, Project(), NormGrowthMonitor(100), **settings)
    assert re.search(r"norm_growth every 100 steps, which is more than the [468] steps of this training: never", first)
    assert re.match(r"normgeo measured 0 of [468] optimizer steps, 0 rows logged\.", last)
    assert len(warned) == 1
    assert re.match(r"Never measured: SGD \([468] steps\)\. Choose a smaller every_n_steps", warned[0])


def test_a_run_of_one_step_at_a_cadence_of_one_is_no_reason_to_warn(caplog: Any) -> None:
    first, last, warned = said(caplog, Project(), NormGrowthMonitor(1), steps=1)
    assert "every step." in first
    assert last == "normgeo measured 1 of 1 optimizer step, 1 row logged."
    assert not warned


class SAM(torch.optim.SGD):
    """Sharpness-aware minimization in its common form: two methods in place of step()."""

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(parameter.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.05)


class TwoMethods(Project):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return SAM(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        for step in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            step()


@pytest.mark.parametrize("every", [1, 3])
def test_steps_in_other_methods_are_not_seen_and_it_is_said(caplog: Any, every: int) -> None:
    _, last, warned = said(caplog, TwoMethods(), NormGrowthMonitor(every), steps=-1, max_epochs=1)
    assert last.startswith("normgeo measured 0 of 0 optimizer steps, 0 rows logged; left out ")
    assert last.endswith(" x: no optimizer took a step.")
    assert len(warned) == 1
    assert warned[0].startswith("No monitor has measured anything: there were backward passes, but no step() of SAM.")
    assert "let step() call them" in warned[0]


class Unknown(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.1 * parameter.grad.sign()
        return loss


def test_an_optimizer_without_a_formula(caplog: Any) -> None:
    _, last, warned = said(caplog, Project(lambda module: Unknown(module.parameters())), NormGrowthMonitor())
    assert last.endswith("4 rows logged; no formula for Unknown, so identity_… keys in place of explained.")
    assert not warned


class Pausing(Project):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Overflowing(Project):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx == 3 else loss


@pytest.mark.parametrize(
    ("project", "reason"),
    [(Pausing, "no backward pass since the last step"), (Overflowing, "its gradients are not finite")],
)
def test_what_is_left_out_is_told_at_the_end(caplog: Any, project: type[Project], reason: str) -> None:
    monitor = NormGrowthMonitor()
    _, last, _ = said(caplog, project(), monitor)
    assert f"; left out 1 x: {reason}" in last
    assert monitor.left_out == {reason: 1}


def test_the_record_keeps_what_was_left_out(caplog: Any, tmp_path: Any) -> None:
    kept: list[Any] = []

    class Keeping(Rows):
        def log_observation(self, observation: dict[str, Any]) -> None:
            kept.append(observation)

    class Broken(Rows):
        def log_observation(self, observation: dict[str, Any]) -> None:
            raise OSError("full")

    _, last, warned = said(caplog, Pausing(), NormGrowthMonitor(), logger=[Broken(), Keeping()])
    (observation,) = kept
    assert observation["summary"] == last
    assert observation["left_out"] == {"no backward pass since the last step": 1}
    (optimizer,) = observation["optimizers"]
    assert (optimizer["class"], optimizer["settings"]["momentum"]) == ("SGD", 0)
    assert [one for one in warned if "Broken failed to keep what was left out" in one]


def test_a_training_that_fails_tells_what_was_measured(caplog: Any) -> None:
    class Failing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise KeyError("stop")
            return super().training_step(batch, batch_idx)

    caplog.set_level(logging.INFO)
    with pytest.raises(KeyError, match="stop"):
        trainer(NormGrowthMonitor()).fit(Failing(), images())
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("normgeo measured 2 of ") for line in lines) == 1


# Residuals


class Rescaling(torch.optim.SGD):
    """Subclass that keeps SGD's step; the test attaches a hook to it."""


def rescaling(factor: float, begin: int = 0) -> Any:
    """Return an SGD optimizer whose post-hook rescales the first weight."""

    def make(module: Any) -> Any:
        optimizer, count = Rescaling(module.parameters(), lr=0.1, momentum=0.9), iter(range(10**6))

        def rescale(*args: Any) -> None:
            if next(count) >= begin:
                module.net[0].weight.data.mul_(factor)

        optimizer.register_step_post_hook(rescale)
        return optimizer

    return make


@pytest.mark.parametrize("begin", [0, 2])
def test_what_no_rounding_explains_is_reported_once(caplog: Any, begin: int) -> None:
    _, _, warned = said(caplog, Project(rescaling(0.99, begin)), NormGrowthMonitor(layers="*"), steps=6)
    assert len(warned) == 1
    match = re.match(
        r"net\.0\.weight: what the step added to ‖W‖² differs from the formula of Rescaling by (\S+), (\d+) times "
        r"what rounding can do",
        warned[0],
    )
    assert match
    assert float(match[1]) < 0
    assert int(match[2]) > 100
    assert "an option of Rescaling that its formula lacks, a hook or a constraint" in warned[0]
    assert "maybe for others of the 3 that Rescaling moves" in warned[0]


def test_controls_are_looked_at_too(caplog: Any) -> None:
    def make(module: Any) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        optimizer.register_step_post_hook(lambda *args: module.net[8].weight.data.mul_(0.99))
        return optimizer

    _, _, warned = said(caplog, Project(make), NormGrowthMonitor())
    assert len(warned) == 1
    assert warned[0].startswith("net.8.weight: what the step added to ‖W‖² differs from the formula of AdamW")


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_optimizers_with_a_formula_give_no_reason(name: str, dtype: torch.dtype) -> None:
    project = Project(lambda module: OPTIMIZERS[name](module.parameters())).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        trainer(NormGrowthMonitor(), steps=8).fit(project, images(dtype=dtype))


@pytest.mark.parametrize("lr", [0.0, 1e-12, 1e-30, 1e-320])
def test_steps_below_rounding_give_no_reason(lr: float) -> None:
    for optimizers in (sgd(lr=lr, weight_decay=0.01), lambda m: torch.optim.AdamW(m.parameters(), lr=lr)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", MeasurementWarning)
            trainer(NormGrowthMonitor(), steps=3).fit(Project(optimizers), images())


def test_weights_of_zeros_give_no_reason() -> None:
    net = ConvNet()
    nn.init.zeros_(net[8].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        trainer(NormGrowthMonitor(), steps=3).fit(Project(net=net), images())


def test_steps_that_the_scaler_skipped_are_not_taken_for_other_methods() -> None:
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**60))
    with pytest.warns(UserWarning, match=r"no step\(\) of SGD. The gradient scaler skipped them"):
        trainer(OrthogonalityMonitor(1), steps=-1, max_epochs=1, plugins=[scaler]).fit(Project(), images(24))
