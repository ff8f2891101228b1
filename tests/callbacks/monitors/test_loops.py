"""Training loops of Lightning and of users: the numbers are right and the training is the same."""

from __future__ import annotations

import copy
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.tuner import Tuner
from torch import nn

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo._lightning import BATCH_HOOKS
from lightning_normgeo.callbacks._monitors.session import Session
from lightning_normgeo.errors import MeasurementWarning
from support.projects import SAM, Account, Fingerprint, Optimizers, Project, Resumed, Rows, images, same, sgd, trainer

SITES = {"norm_growth": ["net.0", "net.3"], "norm_growth_control": ["net.8"]}
ONE_CLOSURE_TOO_MANY = "the optimizer evaluates its closure several times"
MOVED = "the optimizer moves the weights before the gradient is final"


def monitors(every: int = 1) -> list[Any]:
    return [
        NormGrowthMonitor(every, layers="*", cumulative=True),
        OrthogonalityMonitor(every, layers="*"),
        AffineConvergenceMonitor(every, layers="*"),
    ]


@dataclass
class Watched:
    rows: Rows
    account: Account
    monitors: list[Any]
    run: pl.Trainer
    project: Project


def watch(
    project: Callable[[], Project] = Project,
    others: Callable[[], Sequence[Any]] = list,
    gradients: bool = True,
    every: int = 1,
    data: Any = None,
    **settings: Any,
) -> Watched:
    """Train twice, without the package and with it; everything but the logs has to be equal."""
    bare = Fingerprint()
    torch.manual_seed(3)
    trainer(*others(), bare, **settings).fit(project(), data or images())
    torch.manual_seed(3)
    observed, fingerprint = project(), Fingerprint()
    watched = Watched(Rows(), Account(observed if gradients else None), monitors(every), None, observed)
    watched.run = trainer(watched.account, *others(), *watched.monitors, fingerprint, logger=watched.rows, **settings)
    watched.run.fit(observed, data or images())
    assert bare.states
    assert same(bare.states, fingerprint.states)
    return watched


def check(rows: Rows, account: Account, gradients: bool = True) -> None:
    """Compare every row with the weights, and with the gradients of a copy of the model."""
    increments = account.increments()
    assert rows.rows
    for step, metrics in rows.rows:
        for group, layers in SITES.items():
            for suffix, names in {"": layers, **{f"/{layer}": [layer] for layer in layers}}.items():
                own = {key.removesuffix(suffix).removeprefix(f"{group}/"): value for key, value in metrics.items()}
                rounding = 1e-12 * own["weight_norm"] ** 2
                truth = sum(increments[step][f"{name}.weight"] for name in names)
                assert own["increment"] == pytest.approx(truth, rel=1e-9, abs=rounding)
                assert abs(own["residual"]) <= own["storage_floor"] + rounding
    if gradients:
        check_gradients(rows, account)


def check_gradients(rows: Rows, account: Account) -> None:
    predictions = account.predictions()
    for step, metrics in rows.rows:
        for group, layers in SITES.items():
            angles = group.replace("norm_growth", "orthogonality")
            for layer in layers:
                predicted = predictions[step][f"{layer}.weight"]
                assert metrics[f"{group}/predicted/{layer}"] == pytest.approx(predicted, rel=1e-9)
                cosine = float(account.cosines(step, f"{layer}.weight").max())
                assert metrics[f"{angles}/max_abs_cos/{layer}"] == pytest.approx(cosine, rel=1e-9)


# Who calls the optimizers' steps


class Adversarial(pl.LightningModule):
    """Three critic steps for each generator step; records the change of each optimizer's last step itself."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 192), nn.Unflatten(1, (3, 8, 8))
        )
        self.critic = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 1)
        )
        self.last: list[dict[str, float]] = []

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.9),
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        self.last.append({})
        for _ in range(3):
            made = self.generator(torch.randn(8, 4)).detach()
            self._step(critic, self.critic, self.critic(made).mean() - self.critic(batch[0]).mean())
        self._step(generator, self.generator, -self.critic(self.generator(torch.randn(8, 4))).mean())

    def _step(self, optimizer: Any, part: nn.Module, loss: torch.Tensor) -> None:
        before = {n: p.detach().double().clone() for n, p in self.named_parameters()}
        optimizer.zero_grad()
        self.manual_backward(loss, inputs=list(part.parameters()))
        optimizer.step()
        for name, parameter in self.named_parameters():
            if any(parameter is p for p in part.parameters()):
                after = parameter.detach().double()
                self.last[-1][name] = float(((after - before[name]) * (after + before[name])).sum())


def test_of_several_steps_per_batch_the_last_is_published() -> None:
    watched = watch(Adversarial, gradients=False, steps=-1, max_epochs=1)
    layers = {"norm_growth": ["generator.0", "critic.0"], "norm_growth_control": ["critic.4"]}
    assert watched.rows.steps == list(range(8))
    for (_, metrics), last in zip(watched.rows.rows, watched.project.last, strict=True):
        for group, names in layers.items():
            for layer in names:
                own = {key: metrics[f"{group}/{key}/{layer}"] for key in ("increment", "residual", "storage_floor")}
                assert own["increment"] == pytest.approx(last[f"{layer}.weight"], rel=1e-9)
                assert abs(own["residual"]) <= own["storage_floor"]
    sums = {name: sum(step[name] for step in watched.account.increments()) for name in ("critic.0.weight",)}
    assert metrics["norm_growth/cumulative_increment/critic.0"] == pytest.approx(sums["critic.0.weight"], rel=1e-9)
    assert (
        abs(metrics["norm_growth/cumulative_residual/critic.0"])
        <= metrics["norm_growth/cumulative_storage_floor/critic.0"]
    )


class TwoByHand(Project):
    """Manual optimization with two optimizers, with or without Lightning's wrappers."""

    automatic_optimization = False
    wrapped = True

    def configure_optimizers(self) -> Any:
        first, *rest = self.net.parameters()
        return torch.optim.SGD([first], lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizers = self.optimizers(use_pl_optimizer=self.wrapped)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


class Raw(TwoByHand):
    wrapped = False


class WithClosures(TwoByHand):
    """Manual optimization that passes a closure to each optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        def closure() -> torch.Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.zero_grad()
            self.manual_backward(loss)
            return loss

        closure()
        first, second = self.optimizers()
        first.step()
        second.step(closure=lambda: torch.zeros(()))


@pytest.mark.parametrize("project", [TwoByHand, Raw, WithClosures])
def test_optimizers_stepped_by_hand(project: type[Project]) -> None:
    watched = watch(project, steps=-1, max_epochs=1)
    assert watched.rows.steps == list(range(8))
    check(watched.rows, watched.account)


class ByHandInTurns(TwoByHand):
    """Manual optimization: one optimizer steps in even batches, the other in odd ones."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        self.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_only_weights_that_moved_are_published() -> None:
    watched = watch(ByHandInTurns, steps=-1, max_epochs=1)
    increments = watched.account.increments()
    for step, metrics in watched.rows.rows:
        found = {key.rpartition("/")[2] for key in metrics if "/increment/" in key}
        assert found == ({"net.3", "net.8"} if step % 2 else {"net.0"})
        for layer in found:
            group = "norm_growth_control" if layer == "net.8" else "norm_growth"
            assert metrics[f"{group}/increment/{layer}"] == pytest.approx(increments[step][f"{layer}.weight"], rel=1e-9)


class StepsEverySecond(Project):
    """Project that calls the closure itself before the step, and skips every other step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        if batch_idx % 2:
            optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.01}], ids=["plain", "clip-norm"])
def test_an_optimizer_step_of_the_users_own(settings: dict[str, Any]) -> None:
    watched = watch(StepsEverySecond, steps=-1, max_epochs=1, **settings)
    assert watched.rows.steps == [1, 3, 5, 7]
    check(watched.rows, watched.account)
    assert watched.monitors[0].left_out == {"no optimizer took a step": 4}


class Pausing(Project):
    """Project without a loss in every third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


NO_LOSS_SAID = pytest.mark.filterwarnings("ignore:No batch statistics could be read")


@NO_LOSS_SAID
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
def test_batches_without_a_loss() -> None:
    watched = watch(lambda: Pausing(sgd(momentum=0.9, weight_decay=0.01)), steps=-1, max_epochs=1)
    assert watched.rows.steps == [0, 2, 3, 5, 6]
    check(watched.rows, watched.account)
    assert watched.monitors[0].left_out == {"no backward pass since the last step": 3}


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
def test_batches_without_a_loss_are_no_reason_to_warn() -> None:
    trainer(*monitors()).fit(Pausing(), images())


def adamw(module: nn.Module) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def lbfgs(module: nn.Module) -> Any:
    return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)


def sharpness_aware(**settings: Any) -> Optimizers:
    return lambda module: SAM(module.parameters(), **settings)


@pytest.mark.parametrize(
    ("optimizers", "reason", "steps", "at_the_weights"),
    [
        (lbfgs, ONE_CLOSURE_TOO_MANY, 4, True),
        (sharpness_aware(), ONE_CLOSURE_TOO_MANY, 4, True),
        (sharpness_aware(ahead=True), MOVED, 4, False),
    ],
    ids=["lbfgs", "sam", "sam-ahead"],
)
def test_closures_that_are_no_single_step(
    optimizers: Optimizers, reason: str, steps: int, at_the_weights: bool
) -> None:
    with pytest.warns(UserWarning, match=f"What one gradient explains is left out because {reason}") as warned:
        watched = watch(lambda: Project(optimizers), steps=steps)
    said = {str(one.message) for one in warned if "What one gradient explains" in str(one.message)}
    assert len(said) == 1
    left_out = "predicted and cosines are left out too" in said.pop()
    assert watched.monitors[0].left_out == {reason: steps}
    assert watched.rows.steps == list(range(steps))
    keys = watched.rows.curves.keys()
    unexplained = ("explained", "term_", "residual")
    assert not [key for key in keys if key.partition("/")[2].removeprefix("cumulative_").startswith(unexplained)]
    assert (
        ("norm_growth/predicted" in keys) is ("orthogonality/max_abs_cos" in keys) is (not left_out) is at_the_weights
    )
    check_movement(watched)
    if at_the_weights:
        check_gradients(watched.rows, watched.account)


def check_movement(watched: Watched) -> None:
    """Check increments and angles, which need no formula."""
    increments, weights = watched.account.increments(), watched.account.weights
    for step, metrics in watched.rows.rows:
        for group, layers in SITES.items():
            for layer in layers:
                name = f"{layer}.weight"
                assert metrics[f"{group}/increment/{layer}"] == pytest.approx(increments[step][name], rel=1e-9)
                before, after = (weights[i][name].flatten(1) for i in (step, step + 1))
                cosines = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
                angle = float(cosines.clamp(max=1).acos().square().mean().sqrt())
                assert metrics[f"{group}/angular_update/{layer}"] == pytest.approx(angle, rel=1e-5)


def test_the_same_warning_is_given_once() -> None:
    with pytest.warns(UserWarning, match="What one gradient explains") as warned:
        trainer(NormGrowthMonitor(), steps=6).fit(Project(lbfgs), images())
    assert len({str(warning.message) for warning in warned if "one gradient" in str(warning.message)}) == 1


# Other features of Lightning


def averaging(kind: str) -> Callable[[], list[Any]]:
    made: dict[str, Callable[[], Any]] = {
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
        "ema": lambda: EMAWeightAveraging(decay=0.9),
        "averaging": lambda: WeightAveraging(avg_fn=None),
    }
    return lambda: [made[kind]()]


@NO_LOSS_SAID
@pytest.mark.parametrize("kind", ["swa", "ema", "averaging"])
def test_averaging_weights_is_no_step(kind: str) -> None:
    gradients = kind != "swa"  # the last epoch refreshes running statistics, without any backward pass
    watched = watch(others=averaging(kind), gradients=gradients, steps=-1, max_epochs=3, data=images(32))
    assert watched.rows.steps == list(range(12))
    watched.rows.rows.pop()  # after the last step the averaged weights replace the weights
    check(watched.rows, watched.account, gradients)


class Validated(Project):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def val_dataloader(self) -> Any:
        return images(16)


LOOPS: dict[str, tuple[type[Project], dict[str, Any], int]] = {
    "sanity-check": (Validated, {"num_sanity_val_steps": 2, "steps": 12}, 12),
    "validation-inside-the-epoch": (Validated, {"val_check_interval": 3, "steps": 12}, 12),
    "validation-by-steps": (Validated, {"val_check_interval": 5, "check_val_every_n_epoch": None, "steps": 12}, 12),
    "overfit-batches": (Project, {"overfit_batches": 2, "steps": -1, "max_epochs": 3}, 6),
    "limit-train-batches": (Project, {"limit_train_batches": 3, "steps": -1, "max_epochs": 2}, 6),
    "reload": (Project, {"reload_dataloaders_every_n_epochs": 1, "steps": -1, "max_epochs": 2}, 16),
    "incomplete-window": (Project, {"accumulate_grad_batches": 3, "steps": -1, "max_epochs": 2}, 6),
    "detect-anomaly": (Project, {"detect_anomaly": True, "steps": 3}, 3),
    "inference-mode-off": (Validated, {"inference_mode": False, "val_check_interval": 2, "steps": 4}, 4),
}


@pytest.mark.filterwarnings("ignore:You are running in `overfit_batches` mode")
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
@pytest.mark.parametrize(("project", "settings", "steps"), LOOPS.values(), ids=LOOPS.keys())
def test_loops_of_lightnings_own(project: type[Project], settings: dict[str, Any], steps: int) -> None:
    watched = watch(lambda: project(sgd(momentum=0.9)), **settings)
    assert watched.rows.steps == list(range(steps))
    check(watched.rows, watched.account)


def test_fast_dev_run_observes_and_logs_nothing() -> None:
    watched = watch(fast_dev_run=True, steps=-1)
    assert not watched.rows.rows, "Lightning takes the loggers away"
    assert float(watched.run.callback_metrics["norm_growth/weight_norm"]) > 0


@pytest.mark.parametrize("every", [1, 3])
def test_accumulation_by_a_schedule(every: int) -> None:
    """Eight steps of one batch, then 3 + 3 + 2 batches per epoch."""
    watched = watch(
        lambda: Project(sgd(momentum=0.9)),
        lambda: [GradientAccumulationScheduler({0: 1, 1: 3})],
        every=every,
        steps=-1,
        max_epochs=3,
    )
    assert watched.rows.steps == [step for step in range(14) if (step + 1) % every == 0]
    check(watched.rows, watched.account)


class Tunable(Project):
    """Project with the attributes that Lightning's tuner changes."""

    def __init__(self) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=self.lr, momentum=0.9))
        self.lr, self.batch_size = 0.1, 4

    def train_dataloader(self) -> Any:
        return images(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return images(16)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def lr_finder() -> Any:
    return LearningRateFinder(min_lr=0.01, num_training_steps=5, early_stop_threshold=None)


def batch_size_finder() -> Any:
    return BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=4)


@pytest.mark.parametrize("finder", [lr_finder, batch_size_finder], ids=["lr", "batch-size"])
def test_finders_are_not_observed_and_training_is(finder: Any, tmp_path: Path) -> None:
    rows, account, observed = Rows(), Account(), monitors()
    run = trainer(account, finder(), *observed, steps=-1, max_epochs=1, logger=rows, default_root_dir=tmp_path)
    run.fit(Tunable())
    assert rows.steps == list(range(len(rows.steps)))
    assert len(rows.steps) == run.global_step == len(account.increments())
    check(rows, account, gradients=False)
    check_sums(rows, account)


def check_sums(rows: Rows, account: Account) -> None:
    """Check that the sums begin with this training."""
    step, metrics = rows.rows[-1]
    truth = sum(metric[f"net.{i}.weight"] for metric in account.increments()[: step + 1] for i in (0, 3))
    assert metrics["norm_growth/cumulative_increment"] == pytest.approx(truth, rel=1e-9)
    residual = abs(metrics["norm_growth/cumulative_residual"])
    assert residual <= metrics["norm_growth/cumulative_storage_floor"]


def find_lr(run: pl.Trainer, project: Project) -> None:
    Tuner(run).lr_find(project, min_lr=0.01, num_training=5, early_stop_threshold=None)


def scale_batch_size(run: pl.Trainer, project: Project) -> None:
    Tuner(run).scale_batch_size(project, steps_per_trial=2, max_trials=2, init_val=4)


@pytest.mark.parametrize("tune", [find_lr, scale_batch_size], ids=["lr", "batch-size"])
def test_the_tuner_is_not_observed_and_training_is(tune: Any, tmp_path: Path) -> None:
    rows, account, observed, project = Rows(), Account(), monitors(), Tunable()
    run = trainer(account, *observed, steps=-1, max_epochs=1, logger=rows, default_root_dir=tmp_path)
    tune(run, project)
    assert not rows.rows
    account.weights.clear()
    run.fit(project)
    assert rows.steps == list(range(len(rows.steps)))
    assert len(rows.steps) == len(account.increments())
    check(rows, account, gradients=False)
    check_sums(rows, account)


# Interrupted and resumed trainings


def scheduled(module: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def train_on(folder: Path, steps: int, path: Path | None = None, **settings: Any) -> Rows:
    torch.manual_seed(1)
    rows = Rows()
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(*monitors(2), saving, steps=steps, logger=rows, enable_checkpointing=True, **settings)
    run.fit(Project(scheduled), Resumed(), ckpt_path=path)
    return rows


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "accumulate"])
def test_curves_go_on_exactly_after_a_checkpoint_inside_an_epoch(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = train_on(tmp_path / "whole", 18, **settings)
    first = train_on(tmp_path / "parts", 11, **settings)
    rest = train_on(tmp_path / "parts", 18, tmp_path / "parts" / "step=11.ckpt", **settings)
    curves = {key: [*first.curves.get(key, []), *rest.curves.get(key, [])] for key in first.curves | rest.curves}
    assert any("cumulative" in key for key in curves)
    assert curves == whole.curves


class Failing(pl.Callback):
    """Callback that raises once, in one hook."""

    def __init__(self, hook: str, error: BaseException) -> None:
        self.failed = False

        def fail(*args: Any, **kwargs: Any) -> None:
            run = args[0]
            if not self.failed and run.global_step == 2:
                self.failed = True
                raise error

        setattr(self, hook, fail)


class FailingAtOnce(pl.Callback):
    failed = False

    def on_train_start(self, *args: Any) -> None:
        if not self.failed:
            self.failed = True
            raise KeyError("stop")


class FailingStep(Project):
    failed = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if not self.failed and batch_idx == 2:
            self.failed = True
            raise KeyError("stop")
        return loss


def assert_gone(run: pl.Trainer, project: pl.LightningModule) -> None:
    """Check that no hook or attribute of the package is left."""
    assert run not in Session._sessions
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in run.optimizers)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in project.modules())
    assert not any(type(callback).__name__ in ("MonitorHooks", "QuietCallback") for callback in run.callbacks)
    own = [callback for callback in run.callbacks if type(callback).__module__.startswith("lightning_normgeo")]
    assert all(vars(callback)[hook] is None for callback in own for hook in BATCH_HOOKS)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Make the process interruptible again: Lightning ignores further interrupts after the first."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


ERRORS: dict[str, tuple[Any, Any, type[BaseException]]] = {
    "training-step": (FailingStep, list, KeyError),
    "on-train-start": (Project, lambda: [FailingAtOnce()], KeyError),
    **{
        hook.replace("_", "-"): (Project, lambda hook=hook: [Failing(hook, KeyError("stop"))], KeyError)
        for hook in BATCH_HOOKS
    },
    "interrupt": (Project, lambda: [Failing("on_train_batch_end", KeyboardInterrupt())], SystemExit),
    "interrupt-inside-the-step": (Project, lambda: [Failing("on_after_backward", KeyboardInterrupt())], SystemExit),
}


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(("project", "others", "error"), ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize("every", [1, 2])
def test_a_training_that_stopped_leaves_nothing_and_the_next_is_right(
    project: Any, others: Any, error: type[BaseException], every: int
) -> None:
    module, observed, extra = project(), monitors(every), others()
    run = trainer(*observed, *extra, steps=6)
    with pytest.raises(error):
        run.fit(module, images())
    assert_gone(run, module)
    rows, account = Rows(), Account(module)
    again = trainer(account, *observed, *extra, steps=6, logger=rows)
    again.fit(module, images())
    assert_gone(again, module)
    assert rows.steps == [step for step in range(6) if (step + 1) % every == 0]
    check(rows, account)
    check_sums(rows, account)


def test_several_fits_with_the_same_trainer() -> None:
    rows, account, project = Rows(), Account(), Project(sgd(momentum=0.9))
    run = trainer(account, *monitors(), steps=-1, max_epochs=1, logger=rows)
    run.fit(project, images(32))
    account.weights.pop()
    run.fit_loop.max_epochs = 3
    with pytest.warns(MeasurementWarning, match=r"cumulative_… keys count from step 4 on.*ckpt_path"):
        run.fit(project, images(32))
    assert rows.steps == list(range(12))
    check(rows, account, gradients=False)
    assert_gone(run, project)


def test_validation_between_fits_is_not_observed() -> None:
    rows, project = Rows(), Validated()
    run = trainer(*monitors(), steps=2, logger=rows)
    run.fit(project, images())
    run.validate(project, verbose=False)
    assert rows.steps == [0, 1]
    assert_gone(run, project)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(lambda project: None, id="fit"),
        pytest.param(
            lambda project: project.net(next(iter(images()))[0]),
            marks=pytest.mark.xfail(reason="code compiled before there are hooks is not compiled again, nor runs them"),
            id="forward-pass-and-fit",
        ),
    ],
)
def test_a_compiled_network_has_the_same_metrics_in_a_second_fit(before: Any) -> None:
    torch._dynamo.reset()
    project, first, second = Project(), Rows(), Rows()
    project.net.compile(backend="aot_eager")
    before(project)
    trainer(*monitors(), logger=first).fit(project, images())
    assert "affine/abs_beta_minus_mu_mean" in first.curves
    trainer(*monitors(), logger=second).fit(project, images())
    assert second.curves.keys() == first.curves.keys()


# Copies of callbacks


class Copying(pl.Callback):
    """Callback that copies every callback of the trainer in every batch hook."""

    def __init__(self, copied: Callable[[Any], Any]) -> None:
        for hook in (*BATCH_HOOKS, "on_train_start", "on_train_epoch_end", "on_train_end"):
            setattr(self, hook, lambda trainer, *args: copied([c for c in trainer.callbacks if c is not self]))


def pickled(callbacks: Any) -> Any:
    return pickle.loads(pickle.dumps(callbacks))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_callbacks_are_copied_before_during_and_after_training(copied: Any) -> None:
    rows, account, project = Rows(), Account(), Project(adamw)
    observed = copied(monitors())
    trainer(account, *observed, Copying(lambda callbacks: copied(callbacks[-3:])), logger=rows).fit(project, images())
    check(rows, account, gradients=False)
    again, account = Rows(), Account()
    trainer(account, *copied(observed), logger=again).fit(project, images())
    check(again, account, gradients=False)
    check_sums(again, account)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        pickled,
    ],
    ids=["deepcopy", "pickle"],
)
def test_all_callbacks_of_a_trainer_are_copied_during_training(copied: Any) -> None:
    taken: list[Any] = []
    trainer(*monitors(), Copying(lambda callbacks: taken.append(copied(callbacks)))).fit(Project(adamw), images())
    rows, account = Rows(), Account()
    trainer(account, *taken[-1], logger=rows).fit(Project(), images())
    assert rows.steps == [0, 1, 2, 3]
    check(rows, account, gradients=False)


def test_callbacks_of_a_trainer_travel_to_other_processes_before_training() -> None:
    """Strategies that spawn processes pickle the trainer."""
    rows = Rows()
    run = trainer(*monitors(), logger=rows)
    run.callbacks = pickled(run.callbacks)
    run.fit(Project(), images())
    assert rows.steps == [0, 1, 2, 3]


def curves(*callbacks: Any, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Train the same network each time, with checkpoints; return its curves."""
    torch.manual_seed(2)
    rows = Rows()
    saving = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2)
    trainer(*callbacks, saving, logger=rows, enable_checkpointing=True).fit(Project(), images())
    return rows.curves


@pytest.mark.parametrize("kind", [OrthogonalityMonitor, AffineConvergenceMonitor, NormGrowthMonitor])
@pytest.mark.parametrize("second", ["same", "layers", "cadence"])
def test_two_of_one_kind_add_nothing_to_each_other(kind: Any, second: str, tmp_path: Path) -> None:
    layer, other = ("net.1", "net.4") if kind is AffineConvergenceMonitor else ("net.0", "net.3")
    extra = {"cumulative": True} if kind is NormGrowthMonitor else {}
    first = {"layers": layer, **extra}
    both = {
        "same": (first, [layer]),
        "layers": ({**first, "layers": other}, [layer, other]),
        "cadence": ({**first, "every_n_steps": 2}, [layer]),
    }
    settings, layers = both[second]
    alone = curves(kind(**{**first, "layers": layers}), folder=tmp_path / "one")
    assert curves(kind(**first), kind(**settings), folder=tmp_path / "two") == alone


def test_a_step_of_the_scaler_that_is_left_out_last_is_counted() -> None:
    class Overflowing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 3 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    observed = monitors()
    trainer(*observed, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(Overflowing(), images())
    assert observed[0].left_out == {"no optimizer took a step": 1}
