"""Half precision stays in its ball, TF32 is off in checks, radii have effective units."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import RobustnessEvaluation, evaluate_robustness
from lightning_normgeo.robustness import (
    Ball,
    InputSpace,
    RescaledModel,
    RobustnessEvaluator,
    RobustnessSettings,
    folded_model,
)
from lightning_normgeo.robustness.attacks.search.ball import inward
from lightning_normgeo.robustness.model.precision import precision_of
from lightning_normgeo.utilities.tf32 import full_float32
from support import reference as ref
from support.projects import ConvNet, Project, images, trainer
from support.tf32 import convolve_in_tf32

HALVES = [torch.bfloat16, torch.float16]
PIXELS = InputSpace(None, None, normalized_data=False)


# --- half precision ---------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(HALVES))
def test_rounding_goes_toward_the_original(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    origin = torch.randn(50, generator=generator).to(dtype)
    values = origin.float() + 0.1 * torch.randn(50, generator=generator)
    found = inward(values, origin.float(), dtype)
    assert found.dtype == dtype
    assert ((found.double() - origin.double()).abs() <= (values.double() - origin.double()).abs()).all()
    nearest = values.to(dtype).double()
    spacing = torch.maximum(nearest.abs(), found.double().abs()) * torch.finfo(dtype).eps
    assert ((found.double() - nearest).abs() <= spacing + 1e-7).all(), "by one step at most"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("semantics", ["final", "any"])
@pytest.mark.parametrize("normalized", [False, True], ids=["pixels", "normalized"])
def test_what_a_model_in_half_precision_sees_is_in_the_ball(
    dtype: torch.dtype, semantics: Any, normalized: bool
) -> None:
    mean, std = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)) if normalized else ((0.0,) * 3, (1.0,) * 3)
    m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    loaded = ((x - m) / s).to(dtype)
    net, seen = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).to(dtype), []

    def logits(z: Tensor) -> Tensor:
        seen.append(z.detach().clone())
        return net(z)  # type: ignore[no-any-return]

    inputs = InputSpace(mean, std, normalized_data=normalized) if normalized else PIXELS
    attacks = ["bim", "pgd", "bim_l2", "pgd_l2"]
    chosen = RobustnessSettings(eps=0.02, eps_l2=0.1, steps=3, attacks=attacks, semantics=semantics, batch_size=8)
    run = RobustnessEvaluator(logits, inputs, chosen, net)
    run.put(loaded, torch.arange(8) % 3, range(8))
    decisions = run.finish()
    assert run.model.precision == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert all(z.dtype == dtype for z in seen)
    for attack, radius in (("bim", 0.02), ("pgd", 0.02), ("bim_l2", 0.1), ("pgd_l2", 0.1)):
        rows = decisions.of(attack)
        reached = rows.l2 if attack.endswith("l2") else rows.linf
        assert (reached <= radius * (1 + 1e-5)).all()
        assert reached.max() > 0.5 * radius
    origin = loaded.double() * s + m
    if semantics == "final":
        last = seen[-1].double() * s + m
        assert ((last - origin).flatten(1).norm(dim=1) <= 0.1 * (1 + 1e-5)).all()


@pytest.mark.parametrize(("precision", "name"), [("bf16-true", "bf16"), ("64-true", "fp64"), ("32-true", "fp32")])
def test_the_precision_that_a_trainer_computes_in_is_said(precision: Any, name: str, tmp_path: Path) -> None:
    dtype = torch.float64 if precision == "64-true" else torch.float32
    callback = RobustnessEvaluation(eps=0.05, steps=2)
    run = trainer(callback, default_root_dir=tmp_path, precision=precision)
    run.test(Project(), images(16, dtype=dtype), verbose=False)
    report = callback.reports[""]
    assert report.settings["precision"] == name
    assert report.results["bim"].linf <= 0.05 * (1 + 1e-6)
    assert report.results["bim"].n == 16


def test_autocast_is_said_before_the_parameters_precision() -> None:
    report = evaluate_robustness(Project(), images(16), autocast="bf16", attacks=[], progress=False)
    assert report.settings["precision"] == "bf16"
    assert evaluate_robustness(Project(), images(16), attacks=[], progress=False).settings["precision"] == "fp32"


# --- TF32 -------------------------------------------------------------------------------------------------------------


def test_tf32_is_said_of_a_gpu_and_of_nothing_else() -> None:
    class OnGpu:
        dtype, device = torch.float32, torch.device("cuda")

    assert precision_of(torch.zeros(1), None) == "fp32"
    assert precision_of(OnGpu(), None) == "tf32"  # type: ignore[arg-type]
    with full_float32():
        assert precision_of(OnGpu(), None) == "fp32"  # type: ignore[arg-type]
    assert precision_of(OnGpu(), nn.Linear(1, 1).bfloat16()) == "bf16"  # type: ignore[arg-type]


@pytest.fixture
def convolutions_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    convolve_in_tf32(monkeypatch)


def worn() -> nn.Module:
    torch.manual_seed(3)
    net = ConvNet()
    for _ in range(20):
        net(torch.rand(16, 3, 8, 8))
    nn.init.normal_(net[-1].weight, std=3.0)
    return net.eval()


@pytest.mark.usefixtures("convolutions_in_tf32")
def test_neither_folding_nor_the_control_is_refused_for_the_rounding_of_tf32() -> None:
    net, x = worn(), images(24).dataset.tensors[0]
    with torch.no_grad():
        rough = net(x)
        with full_float32():
            exact = net(x)
    assert (rough - exact).abs().max() > 1e-4 * exact.abs().max(), "what cuDNN would do"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = folded_model(net, net, x)
        rescaled = RescaledModel(net, net, x, 10.0)
    assert folded is not None
    assert len(folded.folded) == 2
    assert rescaled.difference < 1e-2
    report = evaluate_robustness(net, images(24), attacks=["bim"], steps=2, rescale=10.0, progress=False)
    assert report.results["clean_rescaled"].n == 24


# --- radii ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["linf", "l2"]))
def test_box_and_ball_in_advertorchs_order(seed: int, norm: Any) -> None:
    """Galloway's code projects onto the box, the ball, and at the end the box again; in l∞ the order is irrelevant."""
    generator = torch.Generator().manual_seed(seed)
    x = 2.2 * torch.rand(4, 2, 3, 3, generator=generator, dtype=torch.float64) - 1.1
    steps = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    ball = Ball(norm, 0.3, -1.0, 1.0, box_first=True)
    found = x
    for slope in steps:
        found = ball.project(ball.ascend(found, slope, 0.2), x)
    torch.testing.assert_close(ball.finish(found), ref.advertorch_iterates(x, steps, norm, 0.3, 0.2, -1.0, 1.0))


def test_galloways_l2_radius_is_shown_in_the_units_that_count() -> None:
    x, y = torch.rand(16, 3, 8, 8), torch.arange(16) % 4
    mean, std = [0.5] * 3, [0.25] * 3
    report = evaluate_robustness(
        Project(), DataLoader(TensorDataset(x, y), 8), preset="galloway2019", attacks=["bim", "bim_l2"], mean=mean,
        std=std, normalized_by="model", steps=2, progress=False,
    )  # fmt: skip
    rows = {row["attack"]: row for row in report.rows()}
    assert rows["bim"]["eps"] == 0.03
    assert rows["bim_l2"]["eps"] == pytest.approx(0.03 * 192**0.5)
    assert report.settings["threat"]["box_first"] is True
    sizes = [(torch.rand(2, 3, 8 + k, 8), torch.tensor([0, 1])) for k in range(2)]
    several = evaluate_robustness(
        copy.deepcopy(Project()), sizes, preset="galloway2019", attacks=["bim_l2"], mean=mean, std=std,
        normalized_by="model", steps=1, progress=False,
    )  # fmt: skip
    assert several.rows()[1]["eps"] is None, "each size has a radius of its own"


def test_a_span_is_told_with_the_digits_that_matter() -> None:
    x = torch.rand(8, 3, 8, 8)
    x[0, 0, 0, 0] = 1.0001
    with pytest.raises(ValueError, match=r"span \[\S+, 1\.0001\]"):
        evaluate_robustness(Project(), DataLoader(TensorDataset(x, torch.arange(8) % 4), 8), progress=False)
