"""Devices without float64, such as Apple's, emulated on a CPU where float64 and unsupported operations raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.geometry import rows
from support.projects import Account, Project, Rows, images, sgd, trainer


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_WITHOUT_FLOAT64", {"cpu"})

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not implemented for this device")

    monkeypatch.setattr(torch, "segment_reduce", missing)


@pytest.mark.usefixtures("coarse")
def test_numbers_are_those_of_float32(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    project, observed = Project(sgd(momentum=0.9, weight_decay=0.01)), Rows()
    account = Account(project)
    monitors = [
        NormGrowthMonitor(layers="*", cumulative=True),
        OrthogonalityMonitor(layers="*"),
        AffineConvergenceMonitor(layers="*"),
    ]
    with caplog.at_level("INFO"):
        trainer(account, *monitors, logger=observed, steps=6).fit(project, images())
    assert observed.steps == list(range(6))
    for (step, metrics), truth in zip(observed.rows, account.increments(), strict=True):
        for layer, group in (("net.0", ""), ("net.3", ""), ("net.8", "_control")):
            got = metrics[f"norm_growth{group}/increment/{layer}"]
            assert got == pytest.approx(truth[f"{layer}.weight"], rel=1e-4, abs=1e-6), (step, layer)
            cosines = account.cosines(step, f"{layer}.weight")
            assert metrics[f"orthogonality{group}/max_abs_cos/{layer}"] == pytest.approx(float(cosines.max()), abs=1e-5)
    assert "no float64: numbers are good to about 1e-6" in caplog.text


@pytest.mark.usefixtures("coarse")
def test_no_tensor_of_the_monitors_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()
    original = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, *args, **kwargs: _noted(original(tensors, *args, **kwargs), seen))
    trainer(NormGrowthMonitor(), OrthogonalityMonitor(), AffineConvergenceMonitor()).fit(Project(), images())
    assert torch.float32 in seen
    assert torch.float64 not in seen


def _noted(tensor: torch.Tensor, seen: set[torch.dtype]) -> torch.Tensor:
    seen.add(tensor.dtype)
    return tensor
