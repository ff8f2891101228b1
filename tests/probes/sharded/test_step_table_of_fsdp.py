"""FSDP2: every optimizer in every way of taking a step, by two processes that share every weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from support.fsdp_step_table import CELLS, LOOPS, QUICK, Cell, Report, observed
from support.isolation import SUPPORT
from support.processes import reports_of
from support.projects import OPTIMIZERS
from support.sharded_rows import KINDS, assert_close
from support.step_table import assert_at_the_floor

SCRIPT = SUPPORT / "fsdp_step_table.py"
GROUP_NORMS = {"norm_growth": ["0", "2"], "norm_growth_control": ["5"]}
COMPARED = [cell for cell in CELLS if cell[1] != "bf16-policy"]
"""One process has no policy: it is one of fully_shard."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Report]]]:
    """Train the quick cells of the table, or the rest of them, in one pair of processes."""
    return cache(lambda cells: reports_of(SCRIPT, tmp_path_factory.mktemp("fsdp_table"), cells))


@pytest.fixture
def two(trained: Callable[[str], list[dict[str, Report]]], request: pytest.FixtureRequest) -> list[dict[str, Report]]:
    """Return the reports of two processes on the cells that a test is about."""
    cell = request.getfixturevalue("cell") if "cell" in request.fixturenames else QUICK[0]
    return trained("quick" if cell in QUICK else "rest")


def cells(chosen: list[Cell]) -> list[Any]:
    """Mark the cells that the quick table lacks as slow."""
    return [pytest.param(cell, id="-".join(cell), marks=() if cell in QUICK else pytest.mark.slow) for cell in chosen]


def assert_explained(rows: Any, kinds: dict[str, list[str]], wide: bool) -> None:
    """Check that the residual of every weight, in every step and cumulatively, is only rounding."""
    for _, row in rows:
        for group, layers in kinds.items():
            suffixes = ["", *(f"/net.{layer}" for layer in layers)]
            found = sorted(key for key in row if key.startswith(f"{group}/residual"))
            assert found == [f"{group}/residual{suffix}" for suffix in suffixes]
            for suffix in suffixes:
                assert_at_the_floor(row, group, suffix, wide)
                floor = row[f"{group}/cumulative_storage_floor{suffix}"]
                rounding = 1e-15 * row[f"{group}/weight_norm{suffix}"] ** 2
                assert abs(row[f"{group}/cumulative_residual{suffix}"]) <= floor + rounding


@pytest.mark.parametrize("cell", cells(CELLS))
def test_divided_steps_are_explained_and_unchanged(two: list[dict[str, Report]], cell: Cell) -> None:
    first, second = (found["-".join(cell)] for found in two)
    assert first == second, "every process knows the same, bit for bit"
    assert first["unchanged"]
    assert set(first["rows"]) == ({"float32", "float64"} if LOOPS[cell[1]].wide else {"float32"})
    for dtype, rows in first["rows"].items():
        assert [step for step, _ in rows] == list(LOOPS[cell[1]].stepped)
        kinds = GROUP_NORMS if cell[1] == "bf16-policy" else KINDS
        assert_explained(rows, kinds, wide=dtype == "float64")


@pytest.mark.parametrize("cell", cells(COMPARED))
def test_divided_steps_are_those_of_one_process(two: list[dict[str, Report]], cell: Cell) -> None:
    wide = LOOPS[cell[1]].wide
    found = two[0]["-".join(cell)]["rows"]["float64" if wide else "float32"]
    assert_close(found, observed(1, cell, wide=wide), residual=1e-13 if wide else 1e-5)


def test_the_table_of_divided_steps_clips(two: list[dict[str, Report]]) -> None:
    """The norm is that of all shards: clipping each shard by its own norm would leave more of the gradient."""
    squares = {}
    for loop in ("plain", "clip-norm", "clip-value"):
        rows = two[0][f"sgd-{loop}"]["rows"]["float64"]
        squares[loop] = [sum(row[f"{group}/predicted"] for group in KINDS) / 0.1**2 for _, row in rows]
    assert all(0.9 * 0.05**2 < square < 0.05**2 for square in squares["clip-norm"])
    assert all(clipped < 0.2 * free for clipped, free in zip(squares["clip-value"], squares["plain"], strict=True))


def test_the_table_of_divided_steps_is_whole() -> None:
    assert len(set(CELLS)) == 8 * 11 == len(LOOPS) * len(OPTIMIZERS)
    assert len(COMPARED) == 7 * 11
