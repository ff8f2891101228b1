"""Cost of observing: nothing on unmeasured steps, one host transfer on a measured one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer import call
from torch.profiler import ProfilerActivity, profile

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor, RobustnessEvaluation
from lightning_normgeo._lightning import BATCH_HOOKS
from lightning_normgeo.callbacks._monitors.units.unit_tracker import UnitTracker
from lightning_normgeo.probes.batch_norm import forward_pass
from support.projects import Project, images, trainer


class Start(pl.Callback):
    """First callback: starts a profiler with one batch, before every other callback."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.profiler.start()


class Stop(pl.Callback):
    """Last callback: stops the profiler after every other callback."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.start.batch:
            self.start.profiler.stop()


class Quiet(Project):
    """Project without self.log, so that two runs differ only in the operators of this package."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


def monitors(every: int) -> list[Any]:
    return [
        OrthogonalityMonitor(every, layers="*"),
        NormGrowthMonitor(every, layers="*"),
        AffineConvergenceMonitor(every, layers="*"),
    ]


def operators(callbacks: list[Any], batch: int) -> Counter[str]:
    start = Start(batch)
    trainer(start, *callbacks, Stop(start), steps=6).fit(Quiet(), images())
    return Counter(
        {event.key: event.count for event in start.profiler.key_averages() if event.key.startswith("aten::")}
    )


def test_an_unmeasured_step_runs_no_operator() -> None:
    assert operators(monitors(every=4), batch=1) == operators([], batch=1)


def test_a_measured_step_reads_no_value_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[int] = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (transfers.append(self.numel()), original(self))[1])
    measured, bare = operators(monitors(every=4), batch=3), operators([], batch=3)
    assert measured["aten::mul"] > bare["aten::mul"], "it was measured"
    assert measured["aten::_local_scalar_dense"] == bare["aten::_local_scalar_dense"]
    assert measured["aten::item"] == bare["aten::item"]
    assert len(transfers) == 1, "one transfer for all monitors, all layers, all quantities"


@pytest.mark.filterwarnings("ignore:Never measured:lightning_normgeo.errors.MeasurementWarning")
def test_only_one_hook_of_all_monitors_is_dispatched_per_unmeasured_batch() -> None:
    """Lightning spends about two microseconds on each hook it calls, empty or not."""
    called: Counter[str] = Counter()

    class Counting(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            for callback in trainer.callbacks:
                if callback is self:
                    continue
                called.update(hook for hook in BATCH_HOOKS if callable(getattr(callback, hook)))

    trainer(Counting(), *monitors(every=100), RobustnessEvaluation(), steps=6).fit(Quiet(), images())
    assert called == {"on_train_batch_start": 6}


def test_hooks_that_are_none_are_skipped_by_lightning() -> None:
    monitor = OrthogonalityMonitor()
    run = trainer(monitor)
    run.strategy.connect(Quiet())
    monitor.setup(run, run.lightning_module, "fit")
    for hook in BATCH_HOOKS:
        call._call_callback_hooks(run, hook)


@pytest.mark.parametrize(
    ("kinds", "most"), [((AffineConvergenceMonitor,), 0), ((AffineConvergenceMonitor, OrthogonalityMonitor), 1)]
)
def test_constants_of_the_forward_pass_are_watched_only_where_a_graph_is_searched(
    kinds: tuple[Any, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watching costs some 50 microseconds for each layer."""
    watched = []
    genuine = UnitTracker.watch_constants
    monkeypatch.setattr(UnitTracker, "watch_constants", lambda self, reads: (watched.append(1), genuine(self, reads)))
    trainer(*(kind(1) for kind in kinds), steps=4).fit(Quiet(), images())
    assert len(watched) == most


class Growing(Quiet):
    """Project with another graph in each of its first steps, as in a mixture of experts before its router settles."""

    def __init__(self, different: int) -> None:
        super().__init__()
        self.different = different

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for _ in range(min(self.global_step, self.different)):
            loss = loss.abs()
        return loss


def test_a_graph_that_recurs_is_searched_once_whatever_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    genuine = UnitTracker._search
    project = Growing(different=20)

    def search(self: UnitTracker, *arguments: Any) -> Any:
        searched.append(project.global_step)
        return genuine(self, *arguments)

    monkeypatch.setattr(UnitTracker, "_search", search)
    trainer(OrthogonalityMonitor(1), steps=26, max_epochs=-1).fit(project, images())
    assert sorted(set(searched)) == [*range(21)]


@pytest.mark.parametrize(
    ("kinds", "hooks"), [((AffineConvergenceMonitor,), 0), ((AffineConvergenceMonitor, OrthogonalityMonitor), 2)]
)
def test_gradients_of_gamma_are_recorded_only_where_they_are_used(
    kinds: tuple[Any, ...], hooks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each hook costs some 40 microseconds in the backward pass."""
    recorded = []
    genuine = forward_pass._note_gradient
    monkeypatch.setattr(forward_pass, "_note_gradient", lambda *args: (recorded.append(1), genuine(*args))[1])
    trainer(*(kind(4) for kind in kinds), steps=4).fit(Quiet(), images())
    assert len(recorded) == hooks
