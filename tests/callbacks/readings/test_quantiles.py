"""Quantiles by selection are those of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo.callbacks._readings.reductions.quantiles import quantile_of_some, quantiles

LEVELS = [0.0, 0.1, 0.5, 0.9, 0.999, 1.0]


@given(
    rows=st.integers(1, 4),
    n=st.one_of(st.integers(1, 300), st.integers(2000, 9000)),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    rounds=st.booleans(),
    levels=st.lists(st.sampled_from(LEVELS), min_size=1, max_size=4),
)
def test_quantiles_are_those_of_torch(
    rows: int, n: int, seed: int, dtype: torch.dtype, rounds: bool, levels: list[float]
) -> None:
    values = torch.randn(rows, n, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    values = (2 * values).round() if rounds else values
    expected = values.quantile(torch.tensor(levels, dtype=dtype), dim=1)
    rounding = n * torch.finfo(dtype).eps * float(values.abs().max())
    torch.testing.assert_close(quantiles(values, *levels), expected, rtol=0, atol=rounding)


@given(
    n=st.one_of(st.integers(1, 300), st.integers(2000, 9000)),
    seed=st.integers(0, 10**6),
    share=st.floats(0.0, 1.0),
    level=st.sampled_from(LEVELS),
)
def test_the_quantile_of_some_values_is_that_of_torch(n: int, seed: int, share: float, level: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, chosen = torch.rand(n, dtype=torch.float64, generator=generator), torch.rand(n, generator=generator) < share
    found = quantile_of_some(values, chosen, level)
    if chosen.any():
        torch.testing.assert_close(found, values[chosen].quantile(level), rtol=0, atol=1e-12)
    else:
        assert found.isnan()


@pytest.mark.parametrize("level", [0.1, 0.999])
def test_the_quantile_of_some_values_is_unknown_only_if_one_of_them_is(level: float) -> None:
    values = torch.arange(2000.0)
    values[7] = torch.nan
    assert quantile_of_some(values, torch.ones(2000, dtype=torch.bool), level).isnan()
    assert quantile_of_some(values, ~values.isnan(), level).isfinite()


@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
def test_special_values(special: float) -> None:
    values = torch.arange(12.0, dtype=torch.float64).view(2, 6).flip(1)
    values[1, 2] = special
    expected = values.quantile(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64), dim=1)
    assert torch.equal(quantiles(values, 0.0, 0.25, 0.5, 1.0).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
def test_special_values_far_below_a_quantile_near_the_top(special: float) -> None:
    values = torch.arange(12000.0, dtype=torch.float64).view(2, 6000)
    values[1, 2] = special
    expected = values.quantile(torch.tensor([0.999], dtype=torch.float64), dim=1)
    torch.testing.assert_close(quantiles(values, 0.999), expected, rtol=1e-15, atol=0, equal_nan=True)


def test_the_values_stay_as_they_are() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    assert quantiles(values, 0.5).tolist() == [[2.0]]
    assert values.tolist() == [[3.0, 1.0, 2.0]]


def test_other_layouts_and_dtypes() -> None:
    values = torch.randn(50, 3, dtype=torch.float64)
    assert torch.equal(quantiles(values.T, 0.3), values.T.quantile(torch.tensor([0.3], dtype=torch.float64), dim=1))
