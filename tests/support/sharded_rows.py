"""Rows that sharded trainings log, compared with those of one process."""

from __future__ import annotations

from typing import Any

import pytest

KINDS = {
    "norm_growth": ["group.0", "joint", "lengths", "matrix", "one_row.0", "up.0", "up_filters.0"],
    "norm_growth_control": ["head"],
}


def assert_close(rows: Any, expected: Any, rel: float = 1e-10, residual: float = 1e-14) -> None:
    """Compare rows; what is a difference of what is equal, to the size of what it is a difference of.

    Args:
        rows: as they were logged.
        expected: likewise.
        rel: up to which values are equal.
        residual: up to which size there may be one, rounding in the weights' dtype.
    """
    assert [step for step, _ in rows] == [step for step, _ in expected]
    for (step, row), (_, other) in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            if "residual" in key:
                assert max(abs(row[key]), abs(other[key])) < residual, (step, key)
                assert row[key] == pytest.approx(other[key], rel=0, abs=2e-14), (step, key)
            elif "cumulative_storage_floor" in key:  # with the sum of what rounding can add to each part
                assert row[key] == pytest.approx(other[key], rel=0.1), (step, key)
            else:
                assert row[key] == pytest.approx(other[key], rel=rel, abs=1e-15), (step, key)
