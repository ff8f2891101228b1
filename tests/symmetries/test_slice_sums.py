"""Sums over slices of parameters against sums over their elements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo.geometry.products import compiled
from lightning_normgeo.symmetries.charges import slice_sums as module
from lightning_normgeo.symmetries.charges.slice_sums import slice_sums, squared_norms
from lightning_normgeo.symmetries.slices import Slices

CPU = torch.device("cpu")


@given(
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    ways=st.lists(st.sets(st.integers(0, 3)), min_size=1, max_size=3),
    block=st.sampled_from([1, 7, 2**18]),
    compiled_from=st.sampled_from([0, 2**16]),
    seed=st.integers(0, 2**16),
)
def test_every_way_to_slice_in_blocks_of_any_size(
    shape: tuple[int, ...], ways: list[set[int]], block: int, compiled_from: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    slices, start = [], 0
    for way in ways:
        axes = tuple(axis for axis in sorted(way) if axis < len(shape) and shape[axis] > 1)
        sizes = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
        slices.append(Slices("w", shape, axes, start, sizes))
        start = slices[-1].stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", {"cpu": block})
        patch.setattr(compiled, "_WORTHWHILE", compiled_from)
        found = slice_sums(slices, {"w": weight}, {"w": gradient}, CPU)
    for own in slices:
        inside = [axis for axis, size in enumerate(own.sizes) if size == 1]
        for sums, product in zip(found, (weight**2, weight * gradient, gradient**2), strict=True):
            expected = (product.sum(inside) if inside else product).reshape(-1)
            torch.testing.assert_close(sums[own.start : own.stop], expected, rtol=1e-13, atol=1e-13)


def test_parameters_that_are_not_given_count_as_zero() -> None:
    slices = [Slices("a", (2,), (0,), 0, (2,)), Slices("b", (3, 2), (1,), 2, (1, 2))]
    sums = squared_norms(slices, {"b": torch.ones(3, 2)}, CPU)
    assert sums.tolist() == [0.0, 0.0, 3.0, 3.0]
    assert sums.dtype == torch.float64


def test_float32_is_summed_in_float64() -> None:
    weight = torch.full((4096, 3), 1 + 2**-20)
    sums = squared_norms([Slices("w", (4096, 3), (1,), 0, (1, 3))], {"w": weight}, CPU)
    assert sums.tolist() == pytest.approx([float((weight.double() ** 2)[:, 0].sum())] * 3, rel=1e-15)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4,), ()])
@pytest.mark.parametrize("compiled_from", [0, 2**16])
def test_complex_numbers_are_pairs(shape: tuple[int, ...], compiled_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WORTHWHILE", compiled_from)
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, *shape, dtype=torch.complex128)
    axes = tuple(range(len(shape)))[:1]
    own = Slices("w", shape, axes, 0, tuple(size if axis in axes else 1 for axis, size in enumerate(shape)))
    found = slice_sums([own], {"w": weight}, {"w": gradient}, CPU)
    rows = [torch.view_as_real(one).reshape(own.count, -1) for one in (weight, gradient)]
    for sums, (a, b) in zip(found, ((0, 0), (0, 1), (1, 1)), strict=True):
        torch.testing.assert_close(sums, (rows[a] * rows[b]).sum(1), rtol=1e-13, atol=1e-13)
