"""Findings for loggers: rows of a table, headline values, and the keys that are needed for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.runs.findings.logged_findings import findings_rows, headlines
from lightning_normgeo.runs.findings.run_findings import FINDING_KEYS, findings_of
from lightning_normgeo.runs.quantities import QUANTITIES
from lightning_normgeo.runs.record import Record


def row(attack: str, accuracy: float) -> dict[str, Any]:
    drop = 0.8 - accuracy
    return {"attack": attack, "accuracy": accuracy, "accuracy_drop": drop, "ci_low": 0.1, "ci_high": 0.9, "n": 10}


def evaluated(*rows: dict[str, Any], stem: str = "robustness") -> Record:
    return Record(Path(), results={stem: {"results": list(rows)}})


def test_findings_need_no_other_keys() -> None:
    metrics = {key: [(0, 0.5), (1, 0.25)] for key in QUANTITIES}
    metrics |= {key: [(0, 0.5), (1, 0.25)] for key in FINDING_KEYS}
    few = {key: metrics[key] for key in FINDING_KEYS}
    for applies in (0.0, 1.0):
        key = "norm_growth/eq16_applies"
        whole, part = (Record(Path(), metrics={**some, key: [(0, applies)]}) for some in (metrics, few))
        assert findings_of(part) == findings_of(whole)
        assert len(findings_of(part)) == 8


def test_headlines_of_a_training() -> None:
    metrics = {"orthogonality/max_abs_cos": [(0, 3e-5), (1, 1e-5)]}
    metrics |= {"norm_growth/increment": [(0, 2.0), (1, -2.0)], "norm_growth/residual": [(0, 0.1), (1, 0.1)]}
    found = headlines(Record(Path(), metrics=metrics))
    assert found == {"about/max_abs_cos": 3e-5, "about/increments_explained": pytest.approx(0.95)}


def test_headlines_of_an_evaluation_are_the_lowest_accuracies_without_controls() -> None:
    rows = row("clean", 0.8), row("gaussian", 0.7), row("bim_eps0.01", 0.5), row("bim_eps0.1", 0.2)
    record = evaluated(*rows, row("bim_eps0.1_rescaled", 0.1))
    expected = {"about/accuracy_clean": 0.8, "about/accuracy_noise": 0.7, "about/accuracy_attack": 0.2}
    assert headlines(record) == expected
    record.results |= evaluated(row("bim", 0.4), stem="robustness_strong").results | {"run": {"seconds": 3}}
    assert headlines(record) == {**expected, "about/accuracy_attack_strong": 0.4}
    assert headlines(evaluated({"attack": "clean", "accuracy": None, "n": 0})) == {}


def test_a_training_that_diverged_says_so_first() -> None:
    record = Record(Path(), metrics={"loss": [(0, 1.0), (5, float("nan"))]})
    assert findings_rows(record) == [["Training", "diverged", "diverged: loss is not finite from step 5 on", ""]]
