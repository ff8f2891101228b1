"""Monitors that another callback holds and forwards hooks to, and monitors that come too late."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_normgeo import (
    AffineConvergenceMonitor,
    EffectiveWeightsSummary,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    SphereProjection,
)
from lightning_normgeo.errors import MeasurementWarning
from support.projects import Project, Rows, images, trainer

HOOKS = [name for name in dir(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown")]


class Forwarding(pl.Callback):
    """Callback that forwards every hook to callbacks of its own."""

    def __init__(self, *callbacks: Any) -> None:
        self.callbacks = callbacks
        for name in HOOKS:
            setattr(self, name, partial(self._forward, name))

    def _forward(self, name: str, *args: Any, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(*args, **kwargs)


def callbacks() -> list[Any]:
    kinds = (NormGrowthMonitor, OrthogonalityMonitor, AffineConvergenceMonitor)
    return [*(kind(2) for kind in kinds), SphereProjection(), EffectiveWeightsSummary()]


def trained(*some: Any) -> tuple[Rows, dict[str, Any]]:
    torch.manual_seed(1)
    rows = Rows()
    run = trainer(*some, logger=rows)
    run.fit(Project(), images())
    return rows, dict(run.callback_metrics)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
def test_a_callback_that_forwards_all_hooks_may_hold_those_of_this_package(used: bool) -> None:
    expected, metrics = trained(*callbacks())
    held = callbacks()
    if used:  # in the list of a Trainer, which skips their empty hooks
        torch.manual_seed(0)
        trainer(*held, steps=2).fit(Project(), images())
    found, others = trained(Forwarding(*held))
    assert found.rows == expected.rows
    assert others == metrics
    assert {key.split("/")[0] for key in metrics} >= {"norm_growth", "orthogonality", "affine", "sphere", "effective"}


class Late(pl.Callback):
    """Callback that adds a monitor during a hook of the training."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._add)

    def _add(self, run: Any, *args: Any) -> None:
        if not any(isinstance(callback, NormGrowthMonitor) for callback in run.callbacks):
            run.callbacks.append(NormGrowthMonitor(1))


@pytest.mark.parametrize("others", [[], [OrthogonalityMonitor]], ids=["alone", "beside another"])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start", "on_train_batch_end"])
def test_a_monitor_that_comes_too_late_says_so_once(hook: str, others: list[Any]) -> None:
    rows = Rows()
    run = trainer(Late(hook), *(kind(1) for kind in others), logger=rows)
    with pytest.warns(MeasurementWarning, match="NormGrowthMonitor measures nothing: its on_fit_start was not called"):
        run.fit(Project(), images())
    assert not any(key.startswith("norm_growth") for key in rows.curves)
    run = trainer(*run.callbacks[1:], logger=(again := Rows()))
    run.fit(Project(), images())
    assert again.curves["norm_growth/increment"]
