"""Verdicts for loggers: rows of a table, and headline values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.claims.claims import CLAIMS
from lightning_normgeo.runs.verdicts.logged_verdicts import COLUMNS, headlines, verdict_rows


def row(attack: str, accuracy: float) -> dict[str, Any]:
    drop = 0.8 - accuracy
    return {"attack": attack, "accuracy": accuracy, "accuracy_drop": drop, "ci_low": 0.1, "ci_high": 0.9, "n": 10}


LOADERS = {
    "photos": {"clean": 0.8, "gaussian": 0.6, "bim": 0.2},
    "sketches": {"clean": 0.7, "gaussian": 0.7, "bim": 0.1, "clean_rescaled": 0.3, "bim_rescaled": 0.05},
}
"""Accuracies by attack for each loader."""


def evaluated(*rows: dict[str, Any], stem: str = "robustness") -> Record:
    return Record(Path(), results={stem: {"results": list(rows)}})


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


def test_headlines_of_several_test_loaders_are_the_lowest_of_all() -> None:
    rows = [row(f"{attack}/{loader}", value) for loader, of in LOADERS.items() for attack, value in of.items()]
    expected = {"about/accuracy_clean": 0.7, "about/accuracy_noise": 0.6, "about/accuracy_attack": 0.1}
    assert headlines(evaluated(*rows)) == expected


def test_a_training_that_diverged_says_so_first() -> None:
    record = Record(Path(), metrics={"loss": [(0, 1.0), (5, float("nan"))]})
    (row,) = verdict_rows(record)
    assert row == ["Training", "diverged", "diverged: loss is not finite from step 5 on", "", "", "", ""]
    assert len(row) == len(COLUMNS)


def test_rows_are_those_of_claims_with_evidence() -> None:
    control = [(step, 0.5) for step in range(12)]
    metrics = {
        "orthogonality/max_abs_cos": [(step, 1e-5) for step in range(12)],
        "orthogonality_control/max_abs_cos": control,
    }
    record = Record(Path(), metrics=metrics, results=evaluated(row("clean", 0.8), row("bim", 0.2)).results)
    found = {each[0]: dict(zip(COLUMNS, each, strict=True)) for each in verdict_rows(record)}
    assert list(found) == [CLAIMS[key].title for key in ("orthogonality", "vulnerability", "decay_attack")]
    law = found["Lemma 3: W ⟂ ∇W"]
    assert (law["verdict"], law["number"], law["threshold"]) == ("supported", "max |cos| 1.0e-05", "limit 1e-03")
    assert "orthogonality/max_abs_cos: 12 steps, 0 to 11" in law["evidence"]
