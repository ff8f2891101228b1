"""Square roots and lengths with the same bits everywhere: those of a twin in numpy, and near the exact ones."""

import numpy as np
import pytest
import torch

from lightning_normgeo.robustness.attacks.random_numbers.ieee_arithmetic import ordered_lengths, square_root
from support import random_twin as twin
from support.tensors import draw

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_roots_are_those_of_the_twin_and_off_by_at_most_one_unit_in_the_last_place(dtype):
    x = torch.cat([draw(50_001).abs(), 10 ** (3 * draw(50_000))]).to(dtype)
    found = square_root(x)
    assert np.array_equal(found.numpy(), twin.square_root(x.numpy()))
    exact = np.sqrt(x.numpy().astype(np.longdouble))
    assert float((np.abs(found.numpy() - exact) / exact).max()) < torch.finfo(dtype).eps
    for part in (slice(0, 1), slice(3, 20), slice(None, None, 7)):
        assert torch.equal(square_root(x[part]), found[part])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_root_of_zero_is_zero(dtype):
    assert square_root(torch.tensor([0.0, 4.0], dtype=dtype)).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 64, 1001])
def test_lengths_are_those_of_the_twin_in_batches_of_any_size_and_layout(width, dtype):
    x = draw(5, width).to(dtype)
    found = ordered_lengths(x)
    assert found.tolist() == [twin.length(row.numpy()) for row in x]
    torch.testing.assert_close(found.double(), x.double().norm(dim=1), rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(ordered_lengths(x[3:4]), found[3:4])
    assert torch.equal(ordered_lengths(x.T.contiguous().T), found)
    assert torch.equal(ordered_lengths(x[:, None].expand(5, 1, width)), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lengths_of_half_precision_are_added_in_float32(dtype):
    x = (100 * draw(5, 1001)).to(dtype)
    assert not x.square().sum(1).isfinite().all() or dtype != torch.float16
    assert torch.equal(ordered_lengths(x), ordered_lengths(x.float()).to(dtype))


def test_lengths_of_no_vectors_and_of_vectors_without_elements():
    assert ordered_lengths(torch.zeros(0, 3)).shape == (0,)
    assert ordered_lengths(torch.zeros(2, 0)).tolist() == [0.0, 0.0]
