"""Rows whose values arrive later, as from a CUDA device: the same rows, two batches later, and none is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn

from lightning_normgeo import (
    AffineConvergenceMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    SymmetryMonitor,
    read_record,
)
from lightning_normgeo.callbacks._readings.publication.transfer import HostCopy
from lightning_normgeo.errors import MeasurementWarning
from support.projects import Project, Rows, images, sgd, trainer


class Arrivals(pl.Callback):
    """Notes the batch in which each row reaches the loggers."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.batch = rows, 0
        self.found: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = trainer.global_step
        self._look()

    def on_train_batch_end(self, *args: Any) -> None:
        self._look()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.batch += 1
        self._look()

    def _look(self) -> None:
        self.found |= {step: self.batch for step in self.rows.steps if step not in self.found}


def observed(
    every: int, *others: Any, project: Any = None, samples: int = 160, **settings: Any
) -> tuple[Rows, Arrivals]:
    rows = Rows()
    arrivals = Arrivals(rows)
    monitors = [
        OrthogonalityMonitor(every, layers="*"),
        NormGrowthMonitor(every, layers="*", cumulative=True),
        AffineConvergenceMonitor(every, layers="*"),
        SymmetryMonitor(every),
    ]
    pl.seed_everything(3, verbose=False)
    project = Project(sgd(momentum=0.9)) if project is None else project()
    trainer(*monitors, *others, arrivals, logger=rows, **settings).fit(project, images(samples))
    return rows, arrivals


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    init = HostCopy.__init__

    def asynchronous(self: HostCopy, values: Tensor) -> None:
        init(self, values)
        self.asynchronous, self._copied = True, torch.cpu.Stream()  # which has the same method

    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda self: None, raising=False)
    monkeypatch.setattr(HostCopy, "__init__", asynchronous)
    return monkeypatch


@pytest.mark.parametrize(("every", "arrives"), [(1, 1), (2, 2), (3, 2), (4, 2)])
def test_late_rows_are_the_same(every: int, arrives: int, late: pytest.MonkeyPatch) -> None:
    rows, arrivals = observed(every, steps=13)
    late.undo()
    expected, at_once = observed(every, steps=13)
    assert rows.rows == expected.rows, "in the same order, under the same steps, the last one too"
    assert all(batch == step for step, batch in at_once.found.items())
    assert {batch - step for step, batch in arrivals.found.items() if step < 12 - every} == {arrives}


def test_the_end_of_an_epoch_has_all_rows(late: pytest.MonkeyPatch) -> None:
    _, arrivals = observed(8, samples=64, steps=20)
    assert arrivals.found == {7: 8, 15: 16}


def test_a_row_that_a_callback_watches_is_there_in_its_own_batch(late: pytest.MonkeyPatch) -> None:
    stopping = EarlyStopping("orthogonality/rms_cos", patience=1000, check_on_train_epoch_end=True)
    _, arrivals = observed(4, stopping, steps=12)
    assert arrivals.found == {3: 3, 7: 7, 11: 11}


class Frozen(nn.Module):
    """A layer that is scale invariant in every graph, and whose gradient a hook turns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
        weight = self.net[0].weight
        weight.register_hook(lambda gradient: gradient + weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("every", [1, 3])
def test_weights_that_late_numbers_refute_are_controls_in_that_row(every: int, late: pytest.MonkeyPatch) -> None:
    def project() -> Project:
        return Project(sgd(), Frozen())

    with pytest.warns(MeasurementWarning, match="the numbers refute it"):
        rows, _ = observed(every, steps=9, project=project)
    late.undo()
    with pytest.warns(MeasurementWarning, match="the numbers refute it"):
        expected, _ = observed(every, steps=9, project=project)
    assert rows.rows[1:] == expected.rows[1:]
    (_, first), (_, wanted) = rows.rows[0], expected.rows[0]
    assert not any(key.startswith("orthogonality/") for key in first)
    assert first.items() <= wanted.items()
    assert all("cumulative_" in key for key in wanted.keys() - first.keys()), "sums of another step are not used"


class Failing(pl.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("the project fails")


def test_an_exception_loses_no_row(late: pytest.MonkeyPatch) -> None:
    rows = Rows()
    monitor = OrthogonalityMonitor(5)
    with pytest.raises(RuntimeError, match="the project fails"):
        trainer(monitor, Failing(), logger=rows, steps=12).fit(Project(), images())
    assert rows.steps == [4]


def test_a_late_step_with_infinite_gradients_is_left_out(late: pytest.MonkeyPatch) -> None:
    class Overflowing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 3 else loss

    rows, monitor = Rows(), OrthogonalityMonitor(2)
    trainer(monitor, logger=rows, steps=4).fit(Overflowing(), images())
    assert rows.steps == [1]
    assert dict(monitor.left_out) == {"its gradients are not finite": 1}


def test_records_are_the_same(late: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def record(name: str) -> Any:
        pl.seed_everything(3, verbose=False)
        logger = RecordLogger(tmp_path, name=name)
        trainer(OrthogonalityMonitor(3), NormGrowthMonitor(2), logger=logger, steps=12).fit(Project(), images())
        return read_record(Path(logger.log_dir))

    found = record("late")
    late.undo()
    expected = record("at-once")
    assert found.metrics == expected.metrics
    assert found.layers == expected.layers


def test_values_are_read_at_once_where_no_memory_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        """A tensor that says that it is on a GPU, and cannot be told from one before it is read."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    def limited(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("CUDA error: out of memory" if kwargs.get("pin_memory") else "not asked for")

    monkeypatch.setattr(torch, "empty", limited)
    copy = HostCopy(torch.tensor([1.0, 2.0]).as_subclass(OnGpu))
    assert not copy.asynchronous
    assert copy.wait() == [1.0, 2.0]
