"""Balancing finds the shortest weights with the same function, and leaves invariant directions alone."""

import re

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from lightning_normgeo import balance, scale_symmetries
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.symmetries import transform
from support.symmetric_networks import NETWORKS, loss_of, symmetric
from support.tensors import draw


def loss(module, batch):
    return float(loss_of(module, batch).detach())


def norm_sq_along(module, symmetries):
    """Return the derivative of ‖θ‖² along each generator, relative to the sum of magnitudes."""
    squares = {name: p.detach().square() for name, p in module.named_parameters()}
    sums = symmetries.slice_sums(squares)
    return symmetries.exponents @ sums / (abs(symmetries.exponents) @ sums)


@pytest.mark.parametrize("name", NETWORKS)
def test_rescalings_are_balanced_and_the_function_stays(name):
    module, batch, symmetries = symmetric(name)
    before, start = loss(module, batch), symmetries.in_role("rescaling")
    report = balance(module, symmetries, example_batch=batch)
    assert loss(module, batch) == pytest.approx(before, rel=1e-12)
    module.eval()
    left = norm_sq_along(module, symmetries)
    moved = report.coefficients != 0
    assert np.abs(left[moved]).max() <= 1e-10
    assert not moved[np.setdiff1d(np.arange(len(symmetries)), start)].any()
    assert report.left_out == 0
    assert report.rescalings + report.left_out == len(start)
    assert report.norm_sq_after < report.norm_sq_before
    assert report.norm_sq_after == pytest.approx(sum(float(p.detach().square().sum()) for p in module.parameters()))
    assert report.imbalance_after <= 1e-10 < 0.1 < report.imbalance_before


@pytest.mark.parametrize("name", ["perceptron with batch norm", "mixed", "llama", "vision transformer"])
def test_a_second_call_changes_nothing(name):
    module, batch, symmetries = symmetric(name)
    balance(module, symmetries, example_batch=batch)
    weights = [p.detach().clone() for p in module.parameters()]
    again = balance(module, symmetries, example_batch=batch)
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
    assert again.norm_sq_after == again.norm_sq_before
    assert not again.coefficients.any()


@pytest.mark.parametrize("name", ["gpt with relu", "vision transformer", "llama with shared keys"])
def test_no_point_of_the_orbit_is_shorter(name):
    """An optimizer that knows nothing of slices finds the same length, element by element."""
    module, batch, symmetries = symmetric(name)
    chosen = symmetries.in_role("rescaling")
    elements = [np.zeros((len(chosen), p.numel())) for p in module.parameters()]
    places = {key: k for k, (key, _) in enumerate(module.named_parameters())}
    for own in symmetries.slices:
        part = symmetries.exponents[chosen][:, own.start : own.stop].toarray()
        for row, values in enumerate(part):
            spread = np.broadcast_to(own.spread(values), own.shape)
            elements[places[own.parameter]][row] += spread.reshape(-1)
    matrix = np.concatenate(elements, 1)
    squares = np.concatenate([p.detach().square().flatten().numpy() for p in module.parameters()])

    def length(c):
        scaled = squares * np.exp(2 * c @ matrix)
        return scaled.sum(), 2 * matrix @ scaled

    best = minimize(
        length, np.zeros(len(chosen)), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15}
    )
    report = balance(module, symmetries, example_batch=batch)
    assert report.norm_sq_after == pytest.approx(best.fun, rel=1e-7)
    assert report.norm_sq_after <= best.fun * (1 + 1e-12)


def test_every_start_on_an_orbit_leads_to_the_same_point():
    module, _, symmetries = symmetric("gpt with relu")
    report = balance(module, symmetries)
    weights = [p.detach().clone() for p in module.parameters()]
    away = np.zeros(len(symmetries))
    rescalings = symmetries.in_role("rescaling")
    away[rescalings] = np.random.default_rng(0).normal(size=len(rescalings))
    transform(module, symmetries, away)
    assert balance(module, symmetries).norm_sq_after == pytest.approx(report.norm_sq_after, rel=1e-12)
    for p, w in zip(module.parameters(), weights, strict=True):
        assert torch.allclose(p, w, rtol=1e-9, atol=1e-12)


def test_the_coefficients_lead_back():
    module, batch, symmetries = symmetric("llama")
    weights = [p.detach().clone() for p in module.parameters()]
    report = balance(module, batch)
    transform(module, symmetries, -report.coefficients)
    for p, w in zip(module.parameters(), weights, strict=True):
        assert torch.allclose(p, w, rtol=1e-12)


def test_zero_sides_are_left_out_and_named():
    module, batch, symmetries = symmetric("relu perceptron")
    with torch.no_grad():
        module.b.weight[:, 2] = 0  # what the third hidden unit feeds
        module.a.bias.zero_()  # harmless: the weight beside it is not zero
    before, unit = loss(module, batch), module.a.weight[2].detach().clone()
    report = balance(module, symmetries)
    assert loss(module, batch) == pytest.approx(before, rel=1e-12)
    assert torch.equal(module.a.weight[2], unit)
    assert (report.rescalings, report.left_out) == (8, 1)
    assert "left out: 1× a.weight[i], a.bias[i] against b.weight[:, i]" in str(report)
    assert report.imbalance_after <= 1e-12


def test_a_network_of_zeros_stays():
    module, _, symmetries = symmetric("relu perceptron")
    for parameter in module.parameters():
        parameter.data.zero_()
    report = balance(module, symmetries)
    assert (report.rescalings, report.left_out, report.norm_sq_after) == (0, 9, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    module, _, symmetries = symmetric("relu perceptron")
    module.b.weight.data[0, 0] = value
    with pytest.raises(ConfigurationError, match=r"b\.weight holds values that are not finite"):
        balance(module, symmetries)


def test_networks_without_rescalings_stay():
    module = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)).double()
    report = balance(module, draw(5, 4))
    assert (report.rescalings, report.norm_sq_before) == (0, report.norm_sq_after)
    assert "Balanced 0 rescalings" in str(report)


@pytest.mark.parametrize("ratio", [1e-9, 1e9])
def test_sides_of_very_different_length_are_balanced(ratio):
    module, batch, symmetries = symmetric("relu perceptron")
    module.a.weight.data *= ratio
    module.a.bias.data *= ratio
    before = loss(module, batch)
    report = balance(module, symmetries)
    assert report.left_out == 0
    assert report.imbalance_after <= 1e-10
    assert loss(module, batch) == pytest.approx(before, rel=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.1)], ids=str)
def test_stored_weights_are_balanced_up_to_rounding(dtype, tolerance):
    module, _, symmetries = symmetric("gpt with relu")
    module.to(dtype)
    first = balance(module, symmetries)
    assert first.imbalance_after < tolerance
    assert balance(module, symmetries).norm_sq_after == pytest.approx(first.norm_sq_after, rel=tolerance)


def test_report_prints_a_table():
    module, batch, _ = symmetric("convolutions")
    report = balance(module, batch)
    lengths = f"{report.norm_sq_before:.4g} -> {report.norm_sq_after:.4g}"
    assert repr(report).startswith(f"BalanceReport(8 rescalings, ‖θ‖² {lengths}, largest imbalance 0.9")
    lines = str(report).splitlines()
    assert re.fullmatch(r"Balanced 8 rescalings: ‖θ‖² 146\.\d+ -> 9[34]\.\d+", lines[0])
    assert lines[1].split() == ["rescalings", "largest", "imbalance", "before", "after", "slices"]
    assert lines[-1].split()[::3] == ["8", "all"]
    assert report.to_frame().loc["all", "rescalings"] == 8
    assert "<table" in report._repr_html_()


def test_training_mode_and_statistics_stay_consistent():
    module, batch, symmetries = symmetric("pre-activation with biases")
    values = [loss(module.train(mode), batch) for mode in (True, False)]
    balance(module, symmetries, example_batch=batch)
    assert [loss(module.train(mode), batch) for mode in (True, False)] == pytest.approx(values, rel=1e-12)
    assert len(scale_symmetries(module.train(), batch)) == len(symmetries)
