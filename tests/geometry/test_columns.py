"""Columns: sums and maxima over runs of units, and repeated numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_normgeo.geometry.columns import repeated, run_maxima, run_sums

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(lengths=LENGTHS, rows=st.sampled_from([(), (1,), (3,)]), seed=st.integers(0, 10**6), strided=st.booleans())
def test_reductions_are_those_of_each_run(lengths: list[int], rows: tuple[int, ...], seed: int, strided: bool) -> None:
    values = drawn((*rows, sum(lengths)), seed)
    values = values.mT.contiguous().mT if strided and rows else values
    runs = values.split(lengths, dim=-1)
    torch.testing.assert_close(run_sums(values, lengths), torch.stack([run.sum(-1) for run in runs], -1))
    assert torch.equal(run_maxima(values, lengths), torch.stack([run.amax(-1) for run in runs], -1))


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_an_empty_run_has_the_sum_zero(lengths: list[int], seed: int) -> None:
    values = drawn((2, sum(lengths)), seed)
    expected = torch.stack([run.sum(-1) for run in values.split(lengths, dim=-1)], -1)
    torch.testing.assert_close(run_sums(values, lengths), expected)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_run(special: float) -> None:
    values = torch.tensor([1.0, special, 2.0, 3.0], dtype=torch.float64)
    expected = torch.tensor([special, 5.0], dtype=torch.float64)
    torch.testing.assert_close(run_sums(values, [2, 2]), expected, equal_nan=True)
    expected = torch.tensor([special, 3.0], dtype=torch.float64)
    torch.testing.assert_close(run_maxima(values, [2, 2]), expected, equal_nan=True)


@given(lengths=LENGTHS, seed=st.integers(0, 10**6))
def test_reductions_by_torch_are_the_same(lengths: list[int], seed: int) -> None:
    """The other way of reducing, which GPUs take, on a CPU: an additional empty run asks for it."""
    values = drawn((3, sum(lengths)), seed)
    torch.testing.assert_close(run_sums(values, [*lengths, 0])[:, :-1], run_sums(values, lengths))
    assert torch.equal(run_maxima(values, [*lengths, 0])[:, :-1], run_maxima(values, lengths))


@given(
    pairs=st.lists(st.tuples(st.sampled_from([0.5, 2.0, torch.tensor(3.0)]), st.integers(0, 3)), min_size=1, max_size=6)
)
def test_numbers_are_repeated(pairs: list[tuple[float | Tensor, int]]) -> None:
    values, lengths = zip(*pairs, strict=True)
    expected = torch.tensor([float(value) for value, length in pairs for _ in range(length)], dtype=torch.float64)
    assert torch.equal(repeated(values, lengths, CPU), expected)
    assert torch.equal(repeated(values, lengths, CPU), expected)
