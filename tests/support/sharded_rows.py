"""Logged rows of sharded trainings, compared with those of one process."""

from __future__ import annotations

from typing import Any

import pytest

KINDS = {
    "norm_growth": ["group.0", "joint", "lengths", "matrix", "one_row.0", "up.0", "up_filters.0"],
    "norm_growth_control": ["head"],
}


def assert_close(rows: Any, expected: Any, rel: float = 1e-10, residual: float = 1e-14) -> None:
    """Check that rows are equal; differences of nearly equal values are compared relative to those values.

    Args:
        rows: the logged rows.
        expected: the rows of one process.
        rel: relative tolerance.
        residual: largest allowed residual, which is rounding in the weights' dtype.
    """
    assert [step for step, _ in rows] == [step for step, _ in expected]
    for (step, row), (_, other) in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            if "residual" in key:
                assert max(abs(row[key]), abs(other[key])) < residual, (step, key)
                assert row[key] == pytest.approx(other[key], rel=0, abs=2e-14), (step, key)
            elif "cumulative_storage_floor" in key:  # the sum of the rounding bounds of all shards
                assert row[key] == pytest.approx(other[key], rel=0.1), (step, key)
            else:
                assert row[key] == pytest.approx(other[key], rel=rel, abs=1e-15), (step, key)
