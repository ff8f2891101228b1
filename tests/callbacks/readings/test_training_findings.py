"""Findings of a training are logged with every logger that has tables, also of a training that was resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, RecordLogger, read_record
from lightning_normgeo.runs.findings.logged_findings import KEYS, TRAINING, findings_rows
from support.projects import Project, Rows, images, sgd, trainer


class Tables(Rows):
    """A logger with tables."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Any]]] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        self.tables[key] = data


def fit(*loggers: Any, steps: int, **settings: Any) -> Any:
    run = trainer(OrthogonalityMonitor(), NormGrowthMonitor(), steps=steps, logger=list(loggers))
    run.fit(Project(sgd(momentum=0.9)), images(24), **settings)
    return run


def test_findings_need_no_record() -> None:
    tables, record = Tables(), RecordLogger("runs")
    fit(tables, record, steps=4)
    alone = Tables()
    fit(alone, steps=4)
    assert [row[0] for row in alone.tables[TRAINING]] == ["W ⟂ ∇W", "Increments explained", "Eq 16", "Norm growth"]
    assert tables.tables[TRAINING] == findings_rows(read_record(record.folder))
    assert "momentum 0.9" in alone.tables[TRAINING][2][3]


@pytest.mark.parametrize("recorded", [True, False])
def test_findings_of_a_resumed_training_are_those_of_all_its_steps_if_it_has_a_record(
    recorded: bool, tmp_path: Path
) -> None:
    first = RecordLogger("runs", version="one")
    fit(first, steps=3).save_checkpoint(tmp_path / "half.ckpt")
    tables, second = Tables(), RecordLogger("runs", version="one")
    fit(tables, *([second] if recorded else []), steps=6, ckpt_path=tmp_path / "half.ckpt")
    norms = [value for _, value in read_record(second.folder).metrics["norm_growth/weight_norm"]]
    growth = next(row for row in tables.tables[TRAINING] if row[0] == "Norm growth")
    if recorded:
        assert growth[1] == f"× {norms[5] / norms[0]:.4f}"
    else:
        assert growth[1] != f"× {norms[-1] / norms[0]:.4f}"


def test_columns_of_the_layer_table_are_explained() -> None:
    tables = Tables()
    fit(tables, steps=2)
    assert {row[0] for row in tables.tables[KEYS]} >= {"norm_growth/increment", "orthogonality/max_abs_cos"}
