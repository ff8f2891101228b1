"""Trainings on a GPU: observing changes nothing, and the numbers are those of an account in float64."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

from lightning_normgeo import (
    AffineConvergenceMonitor,
    BatchGeometryMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    SphereProjection,
    SymmetryMonitor,
)
from lightning_normgeo.geometry.products import compiled
from support.gpu import DEVICE, EMULATED, on_gpu
from support.gpu_trainings import SETTINGS, Setting, Trained, train
from support.projects import same

pytestmark = on_gpu


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not EMULATED:  # Triton's interpreter takes seconds for a training
        monkeypatch.setattr(compiled, "_WORTHWHILE", 0)
    yield
    assert "triton_launches" not in compiled._failed, "the kernels failed"


def monitors(setting: Setting) -> list[Any]:
    return [OrthogonalityMonitor(1), NormGrowthMonitor(1, cumulative=setting.cumulative), AffineConvergenceMonitor(1)]


@pytest.mark.parametrize("name", SETTINGS)
def test_observing_changes_nothing(name: str) -> None:
    setting = SETTINGS[name]
    plain, again = train(setting, []), train(setting, [])
    if not same(plain.state, again.state):
        pytest.skip("this training does not repeat itself")
    seen = train(setting, monitors(setting))
    assert same(plain.state, seen.state)
    rows = len(seen.logger.rows)
    assert rows > 0
    assert rows + sum(seen.left_out.values()) >= seen.steps
    for key, values in seen.state["weights"].items():
        assert values.isfinite().all(), key


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "accumulate"])
def test_numbers_are_those_of_an_account(name: str) -> None:
    setting = SETTINGS[name]
    seen = train(setting, monitors(setting), account=True)
    assert agrees(seen) > 10
    cosines = [
        value
        for layers in seen.logger.layers.values()
        for value in layers.get("orthogonality/max_abs_cos_corrected", layers["orthogonality/max_abs_cos"]).values()
    ]
    exact = not (setting.tf32 or setting.scale or "precision" in setting.trainer or setting.compile)
    assert max(cosines) < (1e-4 if exact else 0.05)


def agrees(seen: Trained) -> int:
    """Compare increments and norms with the account, and residuals with their floors; return how many were compared."""
    compared = 0
    for step, layers in seen.logger.layers.items():
        account = seen.account.increments.get(step, {})
        for group in ("norm_growth", "norm_growth_control"):
            for layer, value in layers.get(f"{group}/increment", {}).items():
                parts = [account[n] for n in (f"{layer}.weight", f"{layer}.bias") if n in account]
                norm = layers[f"{group}/weight_norm"][layer] ** 2
                joint = len(parts) > 1 and abs(norm - parts[0][1]) > 1e-6 * norm
                found, square = map(sum, zip(*(parts if joint else parts[:1]), strict=True))
                assert norm == pytest.approx(square, rel=1e-10)
                assert value == pytest.approx(found, rel=1e-8, abs=1e-13 * square)
                compared += 1
            for layer, value in layers.get(f"{group}/residual", {}).items():
                assert abs(value) <= layers[f"{group}/storage_floor"][layer], (step, layer)
    return compared


def test_every_monitor_observes_and_changes_nothing() -> None:
    setting = SETTINGS["sgd"]
    everything = [*monitors(setting), SymmetryMonitor(1), BatchGeometryMonitor(1, layers="*")]
    plain, seen = train(setting, []), train(setting, everything)
    assert same(plain.state, seen.state)
    keys = {key.partition("/")[0] for _, row in seen.logger.rows for key in row}
    assert {"orthogonality", "norm_growth", "affine"} <= keys


def test_projection_keeps_norms() -> None:
    setting = Setting()
    seen = train(setting, [SphereProjection(), *monitors(setting)], steps=8)
    norms = [layers["norm_growth/weight_norm"]["net.filters"] for _, layers in sorted(seen.logger.layers.items())]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-6)


def test_the_first_step_is_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from support import gpu_trainings as trainings

    net = trainings.SmallNet()
    net.dropout.p = 0.0  # its random numbers differ between devices
    state = copy.deepcopy(net.state_dict())
    rows = []
    for device in (DEVICE, "cpu"):
        monkeypatch.setattr(trainings, "DEVICE", device)
        monkeypatch.setattr(compiled, "_WORTHWHILE", 0 if device != "cpu" else 2**16)
        net.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(train(Setting(), monitors(Setting()), steps=1, net=net.cpu()).logger.rows[0][1])
    assert rows[0].keys() == rows[1].keys()
    for key, value in rows[0].items():
        if not any(part in key for part in ("cos", "residual", "term_gradient", "floor")):
            assert value == pytest.approx(rows[1][key], rel=2e-3, abs=1e-7), key
