"""Scale symmetries of small networks against the null space of gradients over random parameters."""

from __future__ import annotations

import pytest

from support.symmetry_networks import NETWORKS
from support.symmetry_oracle import prepared, verdict


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * case.slow) for name, case in NETWORKS.items()]
)
def test_all_symmetries_are_found(name: str) -> None:
    case = NETWORKS[name]
    result = verdict(prepared(case.build()), case.data, case.loss)
    assert result.gap > 100
    assert result.residual < 1e-11
    assert result.rank == result.found
    assert result.found + case.missed == result.existing
