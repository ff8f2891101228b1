"""The GPU kernel of systematic rounding floors against the formula in torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_normgeo.geometry import IncrementTerms, systematic_floor
from support.triton_interpreter import interpreted

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
VALUES = (0.0, -0.0, 1e-300, -3e-20, 1e-9, -0.2, 5.0, 1e12, math.inf, math.nan)


def compare(terms: torch.Tensor, weight_sq: torch.Tensor, dtype: torch.dtype) -> None:
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of infinite numbers
        found = interpreted().rounding_bounds(list(terms), weight_sq, dtype)
    expected = systematic_floor(IncrementTerms(*terms), weight_sq, dtype)
    finite = expected.isfinite()
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-13, atol=0.0)
    assert torch.equal(found.isfinite(), finite)
    assert finite.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_of_ordinary_steps(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-14, 2, (5, 3000), generator=generator)
    values = torch.randn(5, 3000, dtype=torch.float64, generator=generator) * sizes
    values[3:] = values[3:].abs()
    compare(values[:4], values[4], dtype)


def test_bounds_where_terms_are_zero_tiny_or_not_finite() -> None:
    some = torch.tensor(VALUES, dtype=torch.float64)
    gradient, decay, quadratic, weight_sq = torch.cartesian_prod(some, some, some.abs(), some.abs()).unbind(1)
    for momentum in (torch.zeros_like(gradient), gradient.flip(0)):
        compare(torch.stack([gradient, momentum, decay, quadratic]), weight_sq, torch.float32)
