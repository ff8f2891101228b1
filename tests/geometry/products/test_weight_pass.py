"""Products of units follow from those of their rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo.geometry import AdamRule, SGDRule
from lightning_normgeo.geometry.increments.increment_terms import UpdateRule
from lightning_normgeo.geometry.products.one_pass import weight_products

RULES = {
    "none": (None, 0),
    "sgd": (SGDRule(lr=0.1, momentum=0.9, weight_decay=0.01), 1),
    "adam": (AdamRule(lr=0.1, betas=(0.9, 0.99), eps=1e-8, step=torch.tensor(3.0, dtype=torch.float64)), 2),
}


@given(
    units=st.integers(1, 4),
    rows=st.integers(1, 4),
    width=st.integers(0, 5),
    rule=st.sampled_from(sorted(RULES)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_products_of_rows_add_up_to_those_of_units(
    units: int, rows: int, width: int, rule: str, dtype: torch.dtype
) -> None:
    known: UpdateRule | None
    known, states = RULES[rule]
    torch.manual_seed(0)
    tensors = torch.rand(2 + states, units * rows, width).to(dtype)
    fine = weight_products(*tensors, rule=known).joined(units)
    whole = weight_products(*tensors.view(2 + states, units, rows * width), rule=known)
    for ours, theirs in zip(fine.sums, whole.sums, strict=True):
        assert ours.shape == (units,)
        assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-13)
