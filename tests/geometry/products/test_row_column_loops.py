"""Sums over rows and columns of matrices by compiled loops, against float64 sums of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

loops = pytest.importorskip("lightning_normgeo.geometry.products.row_column_loops", exc_type=ImportError)


def by_torch(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    wide = [tensor.double() for tensor in tensors]
    pairs = [(a, b) for k, a in enumerate(wide) for b in wide[k:]]
    products = torch.stack([a * b for a, b in pairs])
    return products.sum(2), products.sum(1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans()), min_size=1, max_size=4),
    st.integers(1, 300),
    st.integers(0, 2**31),
)
def test_sums_are_those_of_torch(shapes: list[tuple[int, int, bool, bool]], chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = []
    for height, width, wide, pair in shapes:
        dtype = torch.float64 if wide else torch.float32
        matrices.append(
            tuple(torch.randn(height, width, generator=generator, dtype=dtype) for _ in range(1 + int(pair)))
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "_CHUNK", chunk)
        found = loops.row_and_column_sums(matrices)
    for (rows, columns), tensors in zip(found, matrices, strict=True):
        expected_rows, expected_columns = by_torch(tensors)
        assert torch.allclose(rows, expected_rows, rtol=1e-13, atol=1e-13)
        assert torch.allclose(columns, expected_columns, rtol=1e-13, atol=1e-13)


def test_sums_do_not_depend_on_threads() -> None:
    matrices = [(torch.randn(1500, 700), torch.randn(1500, 700))]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(loops.row_and_column_sums(matrices)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_nan_and_infinite_gradients_reach_the_sums() -> None:
    gradient = torch.randn(6, 5)
    gradient[2, 3], gradient[4, 1] = torch.nan, torch.inf
    rows, columns = loops.row_and_column_sums([(torch.randn(6, 5), gradient)])[0]
    assert rows[2].isnan().tolist() == [False, False, True, False, False, False]
    assert columns[2].isnan().tolist() == [False, False, False, True, False]
    assert torch.isinf(rows[2, 4])
    assert torch.isinf(columns[2, 1])
