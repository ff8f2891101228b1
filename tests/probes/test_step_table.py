"""Every optimizer in every way of taking a step: the increment is explained, and measuring changes nothing."""

from __future__ import annotations

import shutil
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normgeo import NormGrowthMonitor
from support.isolation import SUPPORT
from support.processes import reports_of
from support.projects import Fingerprint, Lion, Project, Rows, images, same, trainer
from support.step_table import CELLS_OF_TWO, LOOPS, Loop, assert_cosines, assert_explained, observe, train

SCRIPT = SUPPORT / "ddp_step_table.py"


CELLS = [(name, loop) for loop, way in LOOPS.items() for name in way.names]


def cell(name: str, loop: str) -> Any:
    marks = []
    if loop == "compiled":
        marks = [pytest.mark.filterwarnings("ignore"), pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]
    return pytest.param(name, LOOPS[loop], id=f"{name}-{loop}", marks=marks)


@pytest.mark.parametrize(("name", "way"), [cell(*names) for names in CELLS])
def test_steps_are_explained_and_unchanged(name: str, way: Loop) -> None:
    bare = Fingerprint()
    train(name, way, bare)
    rows, account, fingerprint = observe(name, way)
    assert same(bare.states, fingerprint.states)
    assert_explained(rows, account, way.stepped, wide=False)
    assert_cosines(rows, account, way.stepped)
    if way.wide:
        rows, account, _ = observe(name, way, wide=True)
        assert_explained(rows, account, way.stepped, wide=True)
        assert_cosines(rows, account, way.stepped)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_the_table_clips(wide: bool) -> None:
    """The rows of the table that clip would test little if nothing were clipped."""
    by_norm, by_value = (observe("sgd", LOOPS[loop], wide)[1].gradients for loop in ("clip-norm", "clip-value"))
    for first, second in zip(by_norm, by_value, strict=True):
        assert sum(float(g.square().sum()) for g in first.values()) ** 0.5 == pytest.approx(0.05, rel=1e-4)
        assert max(float(g.abs().max()) for g in second.values()) == pytest.approx(0.01)


SAME_SIZE = {
    "lion": partial(Lion, lr=1e-3),
    "nadam": partial(torch.optim.NAdam, lr=1e-3),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-3),
    "adam-decay": partial(torch.optim.Adam, lr=1e-4, weight_decay=10.0),
}
"""Steps that move all elements by the same amount: always for Lion, for others until they have an average.

The direction may be that of weight decay, where it is added to smaller gradients.
"""


@cache
def large(name: str) -> dict[str, list[tuple[int, float]]]:
    """Return the logged curves of a network with large layers."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(192, 1024, bias=False), nn.BatchNorm1d(1024), nn.ReLU()]
    layers += [nn.Linear(1024, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 4)]
    project, rows = Project(lambda module: SAME_SIZE[name](module.parameters()), nn.Sequential(*layers)), Rows()
    trainer(NormGrowthMonitor(layers="*", cumulative=True), steps=12, logger=rows).fit(project, images())
    return rows.curves


@pytest.mark.parametrize("residual", ["residual", "cumulative_residual"])
@pytest.mark.parametrize("name", SAME_SIZE)
def test_steps_of_one_size_are_explained_down_to_rounding(name: str, residual: str) -> None:
    curves = large(name)
    for key in [key for key in curves if f"/{residual}" in key]:
        floor = dict(curves[key.replace("residual", "storage_floor")])
        assert all(abs(value) <= floor[step] for step, value in curves[key]), key


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Train all cells of the table in one pair of processes; return the failures of each rank."""
    folder = tmp_path_factory.mktemp("ddp")
    return reports_of(SCRIPT, folder, timeout=300)


@pytest.mark.parametrize(
    "names", [pytest.param("-".join(names), id=f"{'-'.join(names)}-ddp") for names in CELLS_OF_TWO]
)
def test_steps_of_two_processes_are_explained_and_unchanged(names: str, two_processes: list[dict[str, str]]) -> None:
    assert [failed[names] for failed in two_processes] == ["", ""]


def test_the_table_is_whole() -> None:
    assert len(set(CELLS)) == 8 * 11 + 6
    assert len(set(CELLS_OF_TWO)) == 11 + 5
