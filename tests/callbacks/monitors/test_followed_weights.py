"""Cumulative sums stay complete when weights are frozen, added or removed; an internal failure is reported once."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import parametrizations

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.callbacks._monitors.cadence import Cadence
from lightning_normgeo.callbacks._monitors.cumulative_state import CumulativeState
from lightning_normgeo.callbacks._monitors.measured_rows import MeasuredRows
from lightning_normgeo.callbacks._monitors.observer import Observer
from lightning_normgeo.callbacks._monitors.session import Session
from lightning_normgeo.callbacks._monitors.units.unit_confirmation import UnitConfirmation
from lightning_normgeo.callbacks._monitors.units.unit_tracker import UnitTracker
from lightning_normgeo.callbacks._readings.publication.publisher import Publisher
from lightning_normgeo.callbacks._readings.reductions.process_sums import ProcessSums
from lightning_normgeo.errors import MeasurementWarning, warn_once
from lightning_normgeo.probes.batch_norm.probe import BatchNormProbe
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.step_probe import StepProbe
from lightning_normgeo.probes.weight_reader import WeightReader
from support.projects import Account, ConvNet, Fingerprint, Project, Resumed, Rows, images, same, sgd, trainer

GROUPS = ("norm_growth", "norm_growth_control")


def observe(project: Project, *others: Any, steps: int = 12, every: int = 4, **settings: Any) -> tuple[Rows, Account]:
    rows, account = Rows(), Account()
    project.double()
    monitor = NormGrowthMonitor(every, layers="*", cumulative=True)
    run = trainer(account, *others, monitor, steps=steps, logger=rows, **settings)
    run.fit(project, images(160, dtype=torch.float64))
    return rows, account


def total(metrics: dict[str, float], key: str, layer: str = "") -> float:
    """Return the sum over invariant weights and controls; zero for a layer that has not moved yet."""
    return sum(metrics.get(f"{group}/cumulative_{key}{layer}", 0.0) for group in GROUPS)


def check(rows: Rows, account: Account, layers: list[str]) -> None:
    """Check that at every row the sums equal the changes so far, of every layer that has ever moved."""
    increments = account.increments()
    for step, metrics in rows.rows:
        for names, suffix in [(layers, ""), *(([layer], f"/{layer}") for layer in layers)]:
            truth = sum(increments[i].get(f"{layer}.weight", 0.0) for i in range(step + 1) for layer in names)
            scale = max(1.0, abs(truth))
            assert total(metrics, "increment", suffix) == pytest.approx(truth, abs=1e-12 * scale)
            assert abs(total(metrics, "residual", suffix)) <= 1e-12 * scale


ALL = ["net.0", "net.3", "net.8"]


class Freezing(Project):
    """Project that freezes a layer in some steps."""

    frozen: tuple[range, ...] = (range(4, 12),)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].weight.requires_grad_(not any(batch_idx in times for times in self.frozen))


@pytest.mark.parametrize(
    "frozen",
    [(range(4, 12),), (range(2, 3), range(5, 9)), (range(3, 4), range(7, 8), range(11, 12))],
    ids=["from-then-on", "and-thawed", "whenever-it-is-measured"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_layers_that_are_frozen_stay_in_the_sums(frozen: Any, momentum: float) -> None:
    project = Freezing(sgd(momentum=momentum))
    project.frozen = frozen
    rows, account = observe(project)
    if range(3, 4) in frozen:  # never in a measured step, so that its existence is unknown
        check(rows, account, ["net.3", "net.8"])
    else:
        check(rows, account, ALL)


class MomentumOff(Project):
    """Project that trains without momentum for some steps; torch keeps the buffers for afterwards."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.optimizers(use_pl_optimizer=False).param_groups[0]["momentum"] = 0.0 if 5 <= batch_idx < 8 else 0.9


def test_momentum_that_is_switched_off_for_a_while() -> None:
    rows, _ = observe(MomentumOff(sgd(momentum=0.9), net=ConvNet(eps=1e-14)))
    for _, metrics in rows.rows:
        truth = metrics["norm_growth/cumulative_increment"]
        assert metrics["norm_growth/cumulative_predicted_momentum"] == pytest.approx(truth, abs=1e-9)


class Replacing(Project):
    """Project that replaces a layer in every second step."""

    def __init__(self) -> None:
        super().__init__(sgd(momentum=0.9))
        self.replaced: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            old, optimizer = self.net[0].weight, self.optimizers(use_pl_optimizer=False)
            self.net[0] = nn.Conv2d(3, 6, 3, padding=1, bias=False).double()
            group = optimizer.param_groups[0]
            group["params"] = [self.net[0].weight if p is old else p for p in group["params"]]
            optimizer.state.pop(old, None)
            self.replaced.append(weakref.ref(old))


def test_layers_that_were_replaced_are_not_kept() -> None:
    project = Replacing()
    alive = []

    class Alive(pl.Callback):
        """Callback that counts the replaced weights that something still refers to."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step in (20, 40, 48):
                gc.collect()
                alive.append(sum(old() is not None for old in project.replaced))

    observe(project, Alive(), steps=48, every=1)
    assert len(project.replaced) == 24
    assert max(alive) <= 16, "those of graphs that may occur again"


class Added(Project):
    """Project that adds a layer to the optimizer later, by add_param_group."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for n, p in self.named_parameters() if n != "net.0.weight"], lr=0.1, momentum=0.9)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.optimizers(use_pl_optimizer=False).add_param_group({"params": [self.net[0].weight], "lr": 0.05})


def test_layers_that_are_added_are_counted_from_then_on() -> None:
    check(*observe(Added()), ALL)


class Grown(Project):
    """Project that creates a new layer during training."""

    start = 0.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.net.append(nn.Linear(4, 4).double())
            self.start = float(self.net[9].weight.detach().square().sum())
            self.optimizers(use_pl_optimizer=False).add_param_group({"params": self.net[9].parameters()})


def test_layers_that_are_new_are_counted_from_then_on() -> None:
    project, rows = Grown(sgd(momentum=0.9)).double(), Rows()
    monitor = NormGrowthMonitor(4, layers="*", cumulative=True)
    trainer(monitor, steps=12, logger=rows).fit(project, images(160, dtype=torch.float64))
    growth = float(project.net[9].weight.detach().square().sum()) - project.start
    metrics = rows.rows[-1][1]
    assert total(metrics, "increment", "/net.9") == pytest.approx(growth, rel=1e-9)
    assert abs(total(metrics, "residual", "/net.9")) < 1e-12


@pytest.mark.filterwarnings("ignore:.*", "default::lightning_normgeo.errors.MeasurementWarning")
@pytest.mark.parametrize("amount", [0.0, 0.3])
def test_pruned_layers_go_on_under_their_name(amount: float) -> None:
    class Pruned(ModelPruning):
        """Project that prunes after the first epoch of four steps."""

    project = Project(sgd(momentum=0.9)).double()
    pruning = Pruned(
        "l1_unstructured",
        parameters_to_prune=[(project.net[0], "weight")],
        amount=amount,
        use_global_unstructured=False,
    )
    rows = Rows()
    monitor = NormGrowthMonitor(1, layers="*", cumulative=True)
    trainer(pruning, monitor, steps=12, limit_train_batches=4, logger=rows).fit(
        project, images(160, dtype=torch.float64)
    )
    layers = {key.rpartition("/")[2] for _, metrics in rows.rows for key in metrics if "cumulative_increment/" in key}
    assert layers == set(ALL)
    assert all("cumulative_increment/net.0" in " ".join(metrics) for _, metrics in rows.rows)


def test_weight_normalized_layers_are_counted() -> None:
    project = Project(sgd(momentum=0.9))
    parametrizations.weight_norm(project.net[3])
    rows, account = observe(project)
    increments = account.increments()
    name = "net.3.parametrizations.weight.original1"
    step, metrics = rows.rows[-1]
    truth = sum(increments[i].get(name, 0.0) for i in range(step + 1))
    assert total(metrics, "increment", "/net.3") == pytest.approx(truth, abs=1e-12)
    assert abs(total(metrics, "residual", "/net.3")) < 1e-12


class ParametrizedLater(Project):
    """Project that gives a layer weight normalization in the middle of training."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 4:
            self.start = float(self.net[3].weight.detach().square().sum())
            parametrizations.weight_norm(self.net[3])
            self.optimizers().param_groups[0]["params"] = list(self.parameters())


def test_a_layer_that_is_parametrized_later_is_counted_once() -> None:
    """Its old and its new parameter have the same memory."""
    project, rows = ParametrizedLater(sgd()).double(), Rows()
    monitor = NormGrowthMonitor(1, layers="*", cumulative=True)
    trainer(monitor, steps=8, logger=rows).fit(project, images(160, dtype=torch.float64))
    metrics = rows.rows[-1][1]
    growth = float(project.net[3].parametrizations.weight.original1.detach().square().sum()) - project.start
    assert total(metrics, "increment", "/net.3") == pytest.approx(growth, abs=1e-12)
    assert abs(total(metrics, "residual")) < 1e-12


class Sparse(Project):
    def __init__(self) -> None:
        super().__init__(sgd())
        self.table = nn.Embedding(5, 192, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0] + self.table(batch[1]).reshape(batch[0].shape)
        return super().training_step([x, batch[1]], batch_idx)


def test_sparse_gradients_are_left_out_with_a_word() -> None:
    with pytest.warns(MeasurementWarning, match=r"table\.weight is left out: its gradient is sparse") as said:
        rows, account = observe(Sparse())
    assert len([one for one in said if "sparse" in str(one.message)]) == 1
    for step, metrics in rows.rows:
        truth = sum(account.increments()[i][f"{layer}.weight"] for i in range(step + 1) for layer in ALL)
        assert total(metrics, "increment") == pytest.approx(truth, abs=1e-12)
        assert not [key for key in metrics if key.endswith("/table") and "explained" in key]


# Checkpoints


def saved(folder: Path) -> Path:
    run = trainer(NormGrowthMonitor(1, cumulative=True), steps=3)
    torch.manual_seed(0)
    run.fit(Project(), Resumed())
    run.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


FORMS: dict[str, Any] = {
    "other-fields": lambda account: account | {"fields": ["start", "predicted"]},
    "no-fields": lambda account: {"sums": account["sums"]},
    "short-rows": lambda account: account | {"sums": {name: row[:3] for name, row in account["sums"].items()}},
    "words": lambda account: account | {"sums": {"net.0.weight": ["a"] * 11}},
    "members": lambda account: account | {"members": {"net.0.weight": 5}},
    "list": lambda account: [1, 2, 3],
    "none": lambda account: None,
    "text": lambda account: "sums",
}


@pytest.mark.parametrize("form", FORMS)
def test_sums_of_another_form_begin_anew(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=False)
    account = checkpoint["lightning_normgeo"]["account"]
    checkpoint["lightning_normgeo"]["account"] = FORMS[form](account)
    torch.save(checkpoint, path)
    rows, fingerprint = Rows(), Fingerprint()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = trainer(NormGrowthMonitor(1, cumulative=True), fingerprint, steps=6, logger=rows)
        run.fit(Project(), Resumed(), ckpt_path=path)
    ours = [str(one.message) for one in said if one.category is MeasurementWarning]
    assert len(ours) == 1
    assert "cumulative_… keys start from zero" in ours[0] or "cumulative_… keys count from step 3 on" in ours[0]
    own = [metrics["norm_growth/increment"] for _, metrics in rows.rows]
    assert len(own) == 3
    assert rows.rows[-1][1]["norm_growth/cumulative_increment"] == pytest.approx(sum(own), rel=1e-6)


@pytest.mark.parametrize("content", [{}, None, [], {"account": 3}], ids=["empty", "none", "list", "number"])
def test_checkpoints_of_anything_are_gone_on_with(content: Any, tmp_path: Path) -> None:
    path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["lightning_normgeo"] = content
    torch.save(checkpoint, path)
    rows = Rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)
        run = trainer(NormGrowthMonitor(1, cumulative=True), steps=6, logger=rows)
        run.fit(Project(), Resumed(), ckpt_path=path)
    assert len(rows.rows) == 3


# Internal failures


@pytest.mark.parametrize("method", ["open", "begin", "commit"])
def test_an_account_that_fails_does_not_lose_the_measurement(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(CumulativeIncrements, method, fail)
    rows = Rows()
    with pytest.warns(MeasurementWarning, match="A measurement failed and is skipped: RuntimeError") as said:
        trainer(NormGrowthMonitor(1, cumulative=True), steps=4, logger=rows).fit(Project(), images())
    assert len([one for one in said if one.category is MeasurementWarning]) == 1
    assert rows.steps == [0, 1, 2, 3]
    for _, metrics in rows.rows:
        assert abs(metrics["norm_growth/residual"]) <= metrics["norm_growth/storage_floor"]


INSIDE: list[tuple[type, str]] = [
    (Session, "sums"),
    (Session, "_open"),
    (Session, "_arm"),
    (Session, "_disarm"),
    (MeasuredRows, "add"),
    (MeasuredRows, "finish"),
    (MeasuredRows, "batch_starts"),
    (MeasuredRows, "_checked"),
    (Session, "_close"),
    (Cadence, "advance"),
    (Cadence, "take"),
    (Cadence, "expected"),
    (Cadence, "fulfil"),
    (Cadence, "finish"),
    (UnitTracker, "forget"),
    (UnitTracker, "read"),
    (UnitTracker, "rest"),
    (UnitTracker, "unseen"),
    (UnitTracker, "report_none"),
    (Observer, "__init__"),
    (Observer, "watch_batch_norms"),
    (Observer, "attach"),
    (Observer, "detach"),
    (Observer, "arm"),
    (Observer, "pause"),
    (Observer, "resume"),
    (Observer, "disarm"),
    (Observer, "before_backward"),
    (Observer, "after_backward"),
    (Observer, "measured"),
    (UnitConfirmation, "readings"),
    (UnitConfirmation, "judge"),
    (CumulativeState, "open"),
    (CumulativeState, "close"),
    (ProcessSums, "__init__"),
    (Publisher, "check"),
    (Publisher, "publish"),
    (Publisher, "finish"),
    (Publisher, "note"),
    (StepProbe, "attach"),
    (StepProbe, "detach"),
    (StepProbe, "arm"),
    (StepProbe, "wait_for"),
    (StepProbe, "reset"),
    (StepProbe, "collect"),
    (StepProbe, "disarm"),
    (WeightReader, "read"),
    (WeightReader, "add_updates"),
    (WeightReader, "clear"),
    (BatchNormProbe, "__init__"),
    (BatchNormProbe, "arm"),
    (BatchNormProbe, "resume"),
    (BatchNormProbe, "pause"),
    (BatchNormProbe, "close"),
    (BatchNormProbe, "collect"),
    (BatchNormProbe, "begin_gradients"),
    (BatchNormProbe, "disarm"),
    (BatchNormProbe, "detach"),
    (CumulativeIncrements, "follow"),
    (CumulativeIncrements, "open"),
    (CumulativeIncrements, "begin"),
    (CumulativeIncrements, "commit"),
    (CumulativeIncrements, "entry"),
    (CumulativeIncrements, "norms_sq"),
    (CumulativeIncrements, "rest"),
    (CumulativeIncrements, "state"),
]


def train(*monitors: Any) -> tuple[list[Any], pl.Trainer]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - its state is compared
    torch.manual_seed(0)
    fingerprint = Fingerprint()
    run = trainer(*monitors, fingerprint, steps=-1, max_epochs=1, accumulate_grad_batches=2)
    run.fit(Project(sgd(momentum=0.9)), images(48))
    return fingerprint.states, run


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return train()[0]


@pytest.mark.parametrize(("owner", "name"), INSIDE, ids=[f"{owner.__name__}.{name}" for owner, name in INSIDE])
def test_what_fails_inside_stops_nobody(
    owner: type, name: str, expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr(owner, name, property(fail) if name == "sums" else fail)
    monitors = [NormGrowthMonitor(1, cumulative=True), OrthogonalityMonitor(2), AffineConvergenceMonitor(1)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        states, run = train(*monitors)
    said = [str(one.message) for one in seen if one.category is MeasurementWarning]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)
        run.save_checkpoint(tmp_path / "last.ckpt")
    assert same(states, expected)
    broken = [one for one in said if "A measurement failed and is skipped" in one]
    assert len(broken) == len(set(broken))
    assert len(set(broken)) <= 1
    for _ in range(2):  # after a training each warning is given whenever it applies
        with pytest.warns(MeasurementWarning, match="again"):
            warn_once("again")
