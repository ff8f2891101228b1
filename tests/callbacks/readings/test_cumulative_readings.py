"""Cumulative increments: ‖W_T‖² - ‖W_0‖² over a whole run is explained by all steps, measured or not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, describe_lion, register_optimizer
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.geometry import IncrementTerms
from lightning_normgeo.geometry.products.one_pass import many_weight_products
from lightning_normgeo.geometry.products.weight_pass import WeightPass, WeightProducts
from support.projects import (
    OPTIMIZERS,
    SAM,
    Account,
    ConvNet,
    Lion,
    Optimizers,
    Project,
    Resumed,
    Rows,
    images,
    sgd,
    trainer,
)

register_optimizer(Lion, describe_lion)

MEMBERS = {
    "norm_growth": {"net.0": ["net.0.weight"], "net.3": ["net.3.weight"]},
    "norm_growth_control": {"net.8": ["net.8.weight"]},
}
Members = dict[str, dict[str, list[str]]]


def observe(project: Project, every: int = 5, steps: int = 20, **settings: Any) -> tuple[Rows, Account]:
    """Train in float64 and sum up every step, by the package and by an independent witness."""
    rows, account = Rows(), Account(twin_of=project.double())
    monitor = NormGrowthMonitor(every, layers="*", cumulative=True)
    data = images(160, dtype=torch.float64)
    trainer(account, monitor, steps=steps, logger=rows, **settings).fit(project, data)
    return rows, account


def check(rows: Rows, account: Account, members: Members = MEMBERS, skipped: Iterable[int] = ()) -> None:
    """Compare every row with the witness's sums, for the whole model and by layer."""
    increments, predictions = account.increments(), account.predictions()
    assert rows.rows
    for step, metrics in rows.rows:
        taken = [i for i in range(step + 1) if i not in set(skipped)]
        for group, layers in members.items():
            everything = {"": [name for names in layers.values() for name in names]}
            for suffix, names in (everything | {f"/{layer}": names for layer, names in layers.items()}).items():
                found = cumulative(metrics, group, suffix)
                truth = sum(increments[i][name] for i in taken for name in names)
                predicted = sum(predictions[i][name] for i in taken for name in names)
                terms = [found[f"term_{name}"] for name in IncrementTerms._fields]
                start = sum(float(account.weights[0][name].square().sum()) for name in names)
                scale = max(start, *map(abs, terms))
                assert found["predicted"] == pytest.approx(predicted, rel=1e-12)
                assert found["increment"] == pytest.approx(truth, abs=1e-13 * scale)
                assert found["explained"] == pytest.approx(truth, abs=1e-13 * scale)
                assert found["residual"] == pytest.approx(0, abs=1e-13 * scale)
                assert sum(terms) == pytest.approx(found["explained"], abs=1e-13 * scale)
                assert 0 < found["storage_floor"] < 1e-13 * scale


def cumulative(metrics: dict[str, float], group: str = "norm_growth", suffix: str = "") -> dict[str, float]:
    """Return the sums of one group, or of one of its layers."""
    prefix = f"{group}/cumulative_"
    own = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return {key.removesuffix(suffix): value for key, value in own.items() if "/" not in key.removesuffix(suffix)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_is_counted(name: str) -> None:
    rows, account = observe(Project(lambda module: OPTIMIZERS[name](module.parameters())))
    assert rows.steps == [4, 9, 14, 19]
    check(rows, account)
    assert abs(cumulative(rows.rows[-1][1])["increment"]) > 1e-5


def scheduled(module: nn.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]


def two_groups(module: Any) -> Any:
    first, *rest = module.net.parameters()
    groups = [{"params": [first], "lr": 0.05}, {"params": rest, "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.01)


CASES: dict[str, tuple[Optimizers, dict[str, Any]]] = {
    "accumulation": (sgd(momentum=0.9), {"accumulate_grad_batches": 2, "steps": 15}),
    "accumulation-with-a-rest": (sgd(), {"accumulate_grad_batches": 3, "steps": 14}),
    "clip-norm": (sgd(momentum=0.9), {"gradient_clip_val": 0.05}),
    "clip-value": (sgd(), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "scheduler": (scheduled, {}),
    "two-groups": (two_groups, {}),
    "every-step-measured": (sgd(momentum=0.9), {"every": 1}),
}


@pytest.mark.parametrize(("optimizers", "settings"), CASES.values(), ids=CASES.keys())
def test_it_does_not_matter_how_the_steps_are_taken(optimizers: Optimizers, settings: dict[str, Any]) -> None:
    check(*observe(Project(optimizers), **settings))


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_steps_that_the_gradient_scaler_skips_add_nothing(fused: bool) -> None:
    class Overflowing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx in (0, 3, 9) else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    project = Overflowing(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, fused=fused))
    rows, account = observe(project, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    skipped = [] if fused else [10]  # a fused optimizer is called in a skipped step and does nothing
    assert rows.steps == [4, *skipped, 14, 19], "the tenth step was skipped, so the next one is measured"
    check(rows, account, skipped=(0, 3, 9))


class TwoOptimizers(Project):
    """Manual optimization with two optimizers after one backward pass."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, *rest = self.net.parameters()
        return torch.optim.SGD([first], lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


def test_several_optimizers_have_one_account() -> None:
    check(*observe(TwoOptimizers(), steps=-1, max_epochs=1))


class ByTurns(TwoOptimizers):
    """Manual optimization with alternating optimizers."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.optimizers()[batch_idx % 2].step()


def test_weights_that_rest_stay_in_the_sums() -> None:
    rows, account = Rows(), Account()
    monitor = NormGrowthMonitor(1, layers="*", cumulative=True)
    trainer(account, monitor, steps=-1, max_epochs=1, logger=rows).fit(ByTurns(), images(32))
    truth = sum(step.get("net.0.weight", 0.0) for step in account.increments())
    assert rows.rows[-1][1]["norm_growth/cumulative_increment/net.0"] == pytest.approx(truth, rel=1e-6)
    assert {"norm_growth/increment/net.0"} <= rows.rows[-2][1].keys() - rows.rows[-1][1].keys(), "it has rested"


class TwoLosses(TwoOptimizers):
    """Each optimizer has a backward pass of its own, as in adversarial networks."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (second, first):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_every_loss_of_a_batch_brings_its_weights_into_the_account() -> None:
    rows, account = Rows(), Account()
    monitor = NormGrowthMonitor(5, layers="*", cumulative=True)
    trainer(account, monitor, steps=-1, max_epochs=1, logger=rows).fit(TwoLosses(), images(80))
    truth = sum(step["net.0.weight"] for step in account.increments())
    assert rows.rows[-1][1]["norm_growth/cumulative_increment/net.0"] == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_float32_is_explained_down_to_rounding(name: str) -> None:
    rows, account = Rows(), Account()
    monitor = NormGrowthMonitor(10, layers="*", cumulative=True)
    project = Project(lambda module: OPTIMIZERS[name](module.parameters()))
    trainer(account, monitor, steps=200, logger=rows).fit(project, images(160))
    assert len(rows.rows) == 20
    increments = account.increments()
    for step, metrics in rows.rows:
        for group, layers in MEMBERS.items():
            names = [name for names in layers.values() for name in names]
            found = cumulative(metrics, group)
            truth = sum(increments[i][name] for i in range(step + 1) for name in names)
            assert found["increment"] == pytest.approx(truth, rel=1e-9, abs=1e-12)
            assert abs(found["residual"]) <= found["storage_floor"]
            assert found["storage_floor"] < 1e-3 * abs(found["increment"])
            for layer in layers:
                own = cumulative(metrics, group, f"/{layer}")
                assert abs(own["residual"]) <= own["storage_floor"]


def test_plain_sgd_adds_what_equation_16_says() -> None:
    """Arora, Li & Lyu 2018: ‖W_T‖² = ‖W_0‖² + Σ η²‖g‖² for scale-invariant weights."""
    rows, account = observe(Project(scheduled_sgd, ConvNet(eps=1e-40)))
    start = sum(float(account.weights[0][f"net.{i}.weight"].square().sum()) for i in (0, 3))
    for _, metrics in rows.rows:
        found = cumulative(metrics)
        assert found["increment"] == pytest.approx(found["predicted"], rel=1e-11, abs=1e-14 * start)
        assert found["predicted"] > 1e-3
        control = cumulative(metrics, "norm_growth_control")
        assert abs(control["increment"] - control["predicted"]) > 0.01 * control["predicted"]


def scheduled_sgd(module: nn.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def test_units_of_weight_and_bias_are_counted_jointly() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GroupNorm(2, 6, eps=1e-40),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    joint = {
        "norm_growth": {"net.0": ["net.0.weight", "net.0.bias"]},
        "norm_growth_control": {"net.5": ["net.5.weight"]},
    }
    check(*observe(Project(sgd(momentum=0.9, weight_decay=0.01), copy.deepcopy(net))), joint)
    plain, account = observe(Project(sgd(), net))
    check(plain, account, joint)
    found = cumulative(plain.rows[-1][1])
    assert found["increment"] == pytest.approx(found["predicted"], rel=1e-11)


def test_closures_called_several_times_leave_the_increment_only() -> None:
    rows, account = Rows(), Account()
    project = Project(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3))
    with pytest.warns(UserWarning, match="evaluates its closure several times"):
        trainer(account, NormGrowthMonitor(2, cumulative=True), steps=6, logger=rows).fit(project, images())
    check_increments_only(rows, account, {"increment", "predicted", "storage_floor"})


class Unknown(torch.optim.Optimizer):
    """Optimizer without a known formula, which moves along the gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * parameter.grad
        return loss


def test_optimizers_without_a_formula_leave_the_increment_and_the_prediction() -> None:
    rows, account = observe(Project(lambda m: Unknown(m.parameters())))
    check_increments_only(rows, account, {"increment", "predicted", "storage_floor"})
    predictions = account.predictions()
    for step, metrics in rows.rows:
        predicted = sum(predictions[i][f"net.{k}.weight"] for i in range(step + 1) for k in (0, 3))
        assert cumulative(metrics)["predicted"] == pytest.approx(predicted, rel=1e-12)


def check_increments_only(rows: Rows, account: Account, keys: set[str]) -> None:
    increments = account.increments()
    for step, metrics in rows.rows:
        found = cumulative(metrics)
        truth = sum(increments[i][f"net.{k}.weight"] for i in range(step + 1) for k in (0, 3))
        assert found["increment"] == pytest.approx(truth, rel=1e-9)
        assert found.keys() == keys


def train_sharpness_aware(ahead: bool) -> tuple[Rows, Account]:
    rows, account = Rows(), Account()
    monitor = NormGrowthMonitor(2, layers="*", cumulative=True)
    project = Project(lambda module: SAM(module.parameters(), ahead=ahead))
    trainer(account, monitor, steps=6, logger=rows).fit(project, images())
    return rows, account


def test_a_coarse_learning_rate_is_explained_down_to_its_rounding() -> None:
    """Torch computes 1 - ηλ in the dtype of a tensor η, here for weights in float64."""

    def adamw(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.01), weight_decay=0.1)

    rows, _ = observe(Project(adamw))
    for _, metrics in rows.rows:
        found = cumulative(metrics)
        assert 1e-14 < abs(found["residual"] / found["increment"]) < 1e-7
        assert abs(found["residual"]) <= found["storage_floor"] < 1e-3 * abs(found["increment"])


@pytest.mark.filterwarnings("ignore:What one gradient explains is left out")
def test_sharpness_aware_steps_leave_what_was_read_at_the_weights() -> None:
    check_increments_only(*train_sharpness_aware(ahead=False), {"increment", "predicted", "storage_floor"})


@pytest.mark.filterwarnings("ignore:What one gradient explains is left out")
def test_weights_moved_before_their_gradient_leave_the_increment_only() -> None:
    check_increments_only(*train_sharpness_aware(ahead=True), {"increment", "storage_floor"})


def test_weights_changed_by_others_are_the_residual() -> None:
    changes: list[float] = []

    class Shrinking(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx in (2, 7):
                weight = pl_module.net[0].weight
                before = float(weight.detach().square().sum())
                weight.data.mul_(0.9)
                changes.append(float(weight.detach().square().sum()) - before)

    rows = Rows()
    monitor = NormGrowthMonitor(5, layers="*", cumulative=True)
    project = Project(sgd(momentum=0.9)).double()
    trainer(monitor, Shrinking(), steps=10, logger=rows).fit(project, images(160, dtype=torch.float64))
    residuals = [metrics["norm_growth/cumulative_residual/net.0"] for _, metrics in rows.rows]
    assert residuals == pytest.approx([changes[0], sum(changes)], rel=1e-12)
    assert rows.rows[-1][1]["norm_growth/cumulative_residual/net.3"] == pytest.approx(0, abs=1e-14)


class Interrupted(Project):
    """Project that catches an out-of-memory error in the third step."""

    automatic_optimization = False

    def on_train_start(self) -> None:
        self.steps = 0
        optimizer: Any = self.trainer.optimizers[0]
        optimizer._init_group = partial(self.fail_once, optimizer._init_group)  # the first function that a step calls

    def fail_once(self, begin: Any, *args: Any) -> Any:
        self.steps += 1
        if self.steps == 3:
            raise MemoryError
        return begin(*args)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        with suppress(MemoryError):
            optimizer.step()


def test_a_step_that_an_error_ends_adds_nothing() -> None:
    rows = Rows()
    monitor = NormGrowthMonitor(5, layers="*", cumulative=True)
    data = images(48, dtype=torch.float64)
    trainer(monitor, steps=-1, max_epochs=1, logger=rows).fit(Interrupted(sgd(momentum=0.9)).double(), data)
    (_, metrics), *_ = rows.rows
    assert metrics["norm_growth/cumulative_predicted/net.0"] > 0
    assert metrics["norm_growth/cumulative_residual/net.0"] == pytest.approx(0, abs=1e-14)


def test_layers_thawed_later_are_counted_from_then_on() -> None:
    class Thawing(Project):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].weight.requires_grad_(batch_idx >= 2)

    rows, account = Rows(), Account()
    monitor = NormGrowthMonitor(6, layers="*", cumulative=True)
    trainer(account, monitor, steps=6, logger=rows).fit(Thawing(), images())
    truth = sum(step["net.0.weight"] for step in account.increments())
    assert rows.rows[-1][1]["norm_growth/cumulative_increment/net.0"] == pytest.approx(truth, rel=1e-9)
    assert rows.rows[-1][1]["norm_growth/cumulative_residual/net.0"] == pytest.approx(0, abs=1e-6)


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def adamw(module: nn.Module) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def train(steps: int, *callbacks: Any, path: Path | None = None, **settings: Any) -> tuple[Rows, pl.Trainer]:
    """Train the same network each time, from a checkpoint if one is given."""
    torch.manual_seed(1)
    rows, project = Rows(), Project(adamw)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = trainer(*callbacks, steps=steps, logger=rows, enable_checkpointing=saves, **settings)
    run.fit(project, Resumed(), ckpt_path=path)
    return rows, run


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    """Epochs have eight steps: the checkpoint is in the middle of the second."""
    whole, _ = train(20, NormGrowthMonitor(2, layers="*", cumulative=True), saving(tmp_path / "whole"))
    first, _ = train(11, NormGrowthMonitor(2, layers="*", cumulative=True), saving(tmp_path / "parts"))
    again, path = NormGrowthMonitor(2, layers="*", cumulative=True), tmp_path / "parts" / "step=11.ckpt"
    rest, _ = train(20, again, saving(tmp_path / "parts"), path=path)
    assert first.steps == [1, 3, 5, 7, 9]
    assert rest.steps == [11, 13, 15, 17, 19]
    assert first.rows + rest.rows == whole.rows


def test_a_checkpoint_saved_after_training_has_the_sums(tmp_path: Path) -> None:
    whole, _ = train(12, NormGrowthMonitor(2, layers="*", cumulative=True))
    first, run = train(6, NormGrowthMonitor(2, layers="*", cumulative=True))
    run.save_checkpoint(tmp_path / "late.ckpt")
    sums = torch.load(tmp_path / "late.ckpt", weights_only=True)["lightning_normgeo"]["account"]["sums"]
    assert sums.keys() == {"net.0.weight", "net.3.weight", "net.3.bias", "net.8.weight", "net.8.bias"}
    rest, _ = train(12, NormGrowthMonitor(2, layers="*", cumulative=True), path=tmp_path / "late.ckpt")
    assert first.rows + rest.rows == whole.rows


# Lightning mistakes the callback for one that saves the last checkpoint, and warns that there is none
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
def test_a_checkpoint_saved_on_an_exception_has_the_sums_of_what_was_done(tmp_path: Path) -> None:
    class Failing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 5:
                raise KeyError("stop")
            return super().training_step(batch, batch_idx)

    rows = Rows()
    saving = [OnExceptionCheckpoint(tmp_path, filename=name) for name in ("before", "after")]
    monitor = NormGrowthMonitor(1, layers="*", cumulative=True)
    run = trainer(saving[0], monitor, saving[1], steps=8, logger=rows, enable_checkpointing=True)
    with pytest.raises(KeyError, match="stop"):
        run.fit(Failing(adamw), images())
    last = rows.rows[-1][1]
    for name in ("before", "after"):
        sums = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["lightning_normgeo"]["account"]["sums"]
        predicted = [sums[f"net.{i}.weight"][1] for i in (0, 3)]
        assert sum(predicted) == pytest.approx(last["norm_growth/cumulative_predicted"], rel=1e-14)


@pytest.mark.parametrize("within_an_epoch", [False, True])
def test_a_checkpoint_without_sums_begins_a_new_account(tmp_path: Path, within_an_epoch: bool) -> None:
    steps = 1 if within_an_epoch else 6
    within = LambdaCallback(on_train_batch_end=lambda run, *_: run.save_checkpoint(tmp_path / "plain.ckpt"))
    _, run = train(steps, NormGrowthMonitor(1), within)
    if not within_an_epoch:
        run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(MeasurementWarning, match=rf"cumulative_… keys count from step {steps} on.*checkpoints"):
        rows, _ = train(steps + 2, NormGrowthMonitor(2, cumulative=True), path=tmp_path / "plain.ckpt")
    ((step, metrics),) = rows.rows
    assert step == steps | 1
    assert abs(metrics["norm_growth/cumulative_residual"]) <= metrics["norm_growth/cumulative_storage_floor"]


def test_only_who_asks_for_sums_saves_them(tmp_path: Path) -> None:
    rows, run = train(4, NormGrowthMonitor(2))
    run.save_checkpoint(tmp_path / "plain.ckpt")
    assert "lightning_normgeo" not in torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert not cumulative(rows.rows[-1][1])


def test_a_second_training_begins_a_new_account() -> None:
    monitor = NormGrowthMonitor(2, layers="*", cumulative=True)
    first, _ = train(6, monitor)
    second, _ = train(6, monitor)
    assert first.rows == second.rows


def test_what_a_search_for_a_learning_rate_restores_is_not_the_account_of_an_earlier_run(tmp_path: Path) -> None:
    monitor = NormGrowthMonitor(2, layers="*", cumulative=True)
    fresh = NormGrowthMonitor(2, layers="*", cumulative=True)
    train(6, monitor)
    settings: dict[str, Any] = {"default_root_dir": tmp_path}
    expected, _ = train(6, search(), fresh, **settings)
    found, _ = train(6, search(), monitor, **settings)
    assert found.rows == expected.rows


def search() -> LearningRateFinder:
    return LearningRateFinder(num_training_steps=3, update_attr=False)


def test_a_search_for_a_learning_rate_in_the_middle_of_training_is_not_counted(tmp_path: Path) -> None:
    class Again(LearningRateFinder):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

        def on_fit_start(self, *args: Any) -> None:
            pass

    rows, account = Rows(), Account()
    monitor = NormGrowthMonitor(2, layers="*", cumulative=True)
    finder = Again(min_lr=0.01, num_training_steps=3, early_stop_threshold=None, update_attr=False)
    run = trainer(account, finder, monitor, steps=12, logger=rows, default_root_dir=tmp_path)
    run.fit(Project(), images())
    truth = sum(step["net.0.weight"] for step in account.increments())
    found = cumulative(rows.rows[-1][1], suffix="/net.0")
    assert found["increment"] == pytest.approx(truth, rel=1e-9)
    assert abs(found["residual"]) <= found["storage_floor"]


def joint_units() -> nn.Module:
    """A network whose units are groups of filters with their biases, whole layers, and the whole matrix."""
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), spectral, nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.parametrize("optimizers", [sgd(momentum=0.9), lambda m: torch.optim.AdamW(m.parameters())])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("net", [None, joint_units])
def test_no_parameter_is_read_twice_in_a_step(
    optimizers: Optimizers, every: int, net: Callable[[], nn.Module] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a measured step, where sums are of what the monitors have read, nor in another one."""
    reads: Counter[int] = Counter()

    def counted(passes: Sequence[WeightPass]) -> list[WeightProducts]:
        reads.update(one.weight.data_ptr() for one in passes if one.gradient is not one.weight)
        return many_weight_products(passes)

    for module in ("weight_reader", "cumulative.increments"):
        monkeypatch.setattr(f"lightning_normgeo.probes.{module}.many_weight_products", counted)
    project = Project(optimizers, net() if net else None)
    monitors = [OrthogonalityMonitor(every), NormGrowthMonitor(every, cumulative=True)]
    trainer(*monitors, steps=4, logger=Rows()).fit(project, images())
    weights = [p for p in project.parameters() if p.ndim > 1 and p.grad is not None]
    assert reads.keys() >= {weight.data_ptr() for weight in weights}
    assert set(reads.values()) == {4}


@pytest.mark.parametrize("net", [None, joint_units])
def test_sums_change_no_other_key(net: Callable[[], nn.Module] | None) -> None:
    """Bit for bit, also where a unit has several of the rows that sums are read by."""

    def logged(cumulative: bool) -> list[Any]:
        torch.manual_seed(3)
        rows, project = Rows(), Project(sgd(momentum=0.9), net() if net else None)
        trainer(NormGrowthMonitor(layers="*", cumulative=cumulative), steps=4, logger=rows).fit(project, images())
        return [{key: value for key, value in row[1].items() if "cumulative" not in key} for row in rows.rows]

    assert logged(cumulative=True) == logged(cumulative=False)


@pytest.mark.parametrize("optimizers", [sgd(momentum=0.9), lambda m: torch.optim.AdamW(m.parameters())])
def test_sums_do_not_depend_on_how_many_steps_are_measured(optimizers: Optimizers) -> None:
    """A step that no monitor measures is read by the sums alone, by the same rows."""

    def sums(every: int) -> dict[str, list[float]]:
        torch.manual_seed(3)
        monitor = NormGrowthMonitor(every, cumulative=True)
        run = trainer(monitor, steps=4, logger=Rows())
        run.fit(Project(optimizers, joint_units()), images())
        checkpoint: dict[str, Any] = {}
        monitor.on_save_checkpoint(run, run.lightning_module, checkpoint)
        return checkpoint["lightning_normgeo"]["account"]["sums"]

    often, seldom = sums(every=1), sums(every=4)
    assert often.keys() == seldom.keys()
    for name, one in often.items():
        assert one == pytest.approx(seldom[name], rel=1e-12), name
