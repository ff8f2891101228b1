"""Spectral norms by Lanczos' method, against dense singular value decompositions of the operators."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    convolution_norm,
    covariance,
    effective_weight,
    largest_singular_value,
    patch_columns,
    preactivation_variance,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
FUNCTIONS = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(weight: Tensor, size: tuple[int, ...], transposed: bool = False, **options: Any) -> Tensor:
    """The matrix of a convolution, column by column."""
    channels = weight.shape[0] if transposed else weight.shape[1] * options.get("groups", 1)
    count = channels * math.prod(size)
    function = FUNCTIONS[len(size), transposed]
    columns = [
        function(unit.view(1, channels, *size), weight, **options).flatten() for unit in torch.eye(count).double()
    ]
    return torch.stack(columns, 1)


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[0])


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "stride 1": ((6, 5, 3, 3), (8, 8), {"padding": 1}),
    "stride 2": ((6, 5, 3, 3), (8, 8), {"padding": 1, "stride": 2}),
    "no padding": ((6, 5, 3, 3), (7, 9), {}),
    "wide padding, stride (2, 3)": ((4, 3, 5, 3), (9, 7), {"padding": (4, 1), "stride": (2, 3)}),
    "dilation": ((4, 3, 3, 3), (9, 9), {"padding": 2, "dilation": 2}),
    "groups": ((6, 2, 3, 3), (6, 6), {"padding": 1, "groups": 3, "stride": 2}),
    "depthwise": ((4, 1, 3, 3), (7, 7), {"padding": 1, "groups": 4}),
    "pointwise": ((6, 4, 1, 1), (5, 5), {}),
    "one position": ((6, 4, 3, 3), (3, 3), {}),
    "1d": ((5, 4, 3), (20,), {"padding": 1, "stride": 2}),
    "3d": ((4, 2, 2, 3, 2), (4, 5, 4), {"stride": (1, 2, 1)}),
    "transposed": ((5, 3, 3, 3), (5, 6), {"transposed": True, "stride": 2, "padding": 1}),
    "transposed, groups, 1d": ((4, 3, 3), (9,), {"transposed": True, "groups": 2, "dilation": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_norm_is_that_of_the_dense_operator(case: str) -> None:
    shape, size, options = CASES[case]
    weight = random(*shape)
    expected = largest(dense(weight, size, **options))
    assert convolution_norm(weight, size, steps=60, **options).value == pytest.approx(expected, rel=1e-9)
    usual = convolution_norm(weight, size, **options)
    assert usual.steps <= 30
    assert 0 <= expected * (1 + 1e-12) - usual.value <= usual.residual + 2e-12 * expected
    assert usual.value == pytest.approx(expected, rel=1e-4)


def test_other_ways_are_wrong_by_percents() -> None:
    """The reason for Lanczos: the reshaped kernel and the circular convolution have other spectral norms."""
    weight = random(6, 5, 3, 3, seed=2)
    exact = largest(dense(weight, (8, 8), padding=1))
    circular = torch.linalg.svdvals(torch.fft.fft2(weight, (8, 8)).permute(2, 3, 0, 1)).max()
    assert float(circular) / exact > 1.03
    assert largest(weight.flatten(1)) / exact < 0.7


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 7), (40, 40), (1, 9)])
def test_matrices(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    found = largest_singular_value(lambda x: x @ matrix.T, torch.empty(3, shape[1]).double(), steps=60)
    assert found.value == pytest.approx(largest(matrix), rel=1e-12)


@PROPERTY
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([1e-100, 1e-3, 1.0, 1e100]),
    st.integers(0, 9),
)
def test_the_bound_holds_after_any_number_of_steps(
    rows: int, columns: int, steps: int, scale: float, seed: int
) -> None:
    matrix = scale * random(rows, columns, seed=seed)
    found = largest_singular_value(lambda x: matrix @ x, torch.empty(columns).double(), steps)
    values = torch.linalg.svdvals(matrix)
    assert found.value <= float(values[0]) * (1 + 1e-12)
    assert float((values - found.value).abs().min()) <= found.residual + 1e-12 * float(values[0])
    assert found.steps <= min(steps, rows, columns)


def test_the_value_is_attained_and_grows_with_the_steps() -> None:
    weight = random(6, 5, 3, 3)
    found = [convolution_norm(weight, (12, 12), padding=1, steps=steps) for steps in range(1, 20)]
    values = [one.value for one in found]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(values))
    assert [one.steps for one in found] == list(range(1, 20))
    assert found[-1].residual < 1e-2 * found[0].residual


def test_it_stops_early() -> None:
    matrix = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    found = largest_singular_value(lambda x: matrix @ x, torch.empty(8).double())
    assert found.value == pytest.approx(9, rel=1e-13)
    assert found.steps <= 4  # three different eigenvalues, and rounding
    loose = convolution_norm(random(6, 5, 3, 3), (12, 12), padding=1, steps=60)
    tight = largest_singular_value(
        lambda x: F.conv2d(x, random(6, 5, 3, 3), padding=1), torch.empty(1, 5, 12, 12).double(), 60, tolerance=1e-3
    )
    assert tight.steps < loose.steps
    assert tight.residual <= 1e-3 * tight.value


def test_zero_operators_and_values_that_are_not_finite() -> None:
    zero = convolution_norm(torch.zeros(2, 2, 3, 3), (4, 4))
    assert (zero.value, zero.residual, zero.steps) == (0.0, 0.0, 0)
    for wrong in (math.nan, math.inf):
        weight = random(2, 2, 3, 3)
        weight[0, 0, 1, 1] = wrong
        assert math.isnan(convolution_norm(weight, (4, 4)).value)


def test_single_precision_is_as_good_as_its_rounding() -> None:
    weight = random(6, 5, 3, 3)
    expected = largest(dense(weight, (8, 8), padding=1))
    found = convolution_norm(weight.float(), (8, 8), padding=1)
    assert found.value == pytest.approx(expected, rel=2e-6)
    assert found.value != expected


def test_nothing_else_changes_and_the_result_is_the_same_each_time() -> None:
    weight = random(6, 5, 3, 3).requires_grad_()
    state = torch.get_rng_state()
    with torch.inference_mode():
        first = convolution_norm(weight, (12, 12), padding=1)
    again = convolution_norm(weight, (12, 12), padding=1)
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert weight.grad is None
    operator = lambda x: F.conv2d(x, weight.detach(), padding=1)  # noqa: E731
    other = largest_singular_value(operator, torch.empty(1, 5, 12, 12).double(), seed=1)
    assert other.value != first.value
    assert other.value == pytest.approx(first.value, rel=1e-4)


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_effective_weight_of_a_convolution_lies_on_the_ellipsoid(eps: float, stride: int) -> None:
    """W'Σ_X W'ᵀ = γ²σ²/(σ² + ε), with dense Σ_X of the patches and σ² of the convolution itself."""
    x, weight, gamma = random(3, 5, 6, 6), random(4, 5, 3, 3, seed=1), random(4, seed=2)
    y = F.conv2d(x, weight, padding=1, stride=stride)
    variance = y.var((0, 2, 3), unbiased=False)
    sigma = covariance(patch_columns(x, (3, 3), stride=stride, padding=1))
    effective = effective_weight(weight, gamma, variance, eps)
    found = preactivation_variance(effective.flatten(1), sigma)
    assert float((found / (gamma.square() * variance / (variance + eps)) - 1).abs().max()) <= 1e-12
