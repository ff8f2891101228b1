"""The tables of the page of effective weights: correlations recomputed from the recorded runs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from scipy import stats

from lightning_normgeo.runs.quantities.table import QUANTITIES
from lightning_normgeo.utilities.attack_names import attack_title
from support.pages import DOCS

RECORD: dict[str, Any] = json.loads((DOCS / "records" / "effective_weights.json").read_text(encoding="utf-8"))
PAGE = (DOCS / "callbacks" / "effective_weights.md").read_text(encoding="utf-8")
ROWS = [dict(zip(RECORD["table"]["columns"], row, strict=True)) for row in RECORD["table"]["rows"]]


def key_of(label: str) -> str:
    return next(key for key, one in QUANTITIES.items() if key.startswith("effective/") and one.label == label)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['quantity']}, {row['accuracy under']}")
def test_each_correlation_is_that_of_the_runs(row: dict[str, str]) -> None:
    runs = RECORD["runs"].values()
    (attack,) = {name for run in runs for name in run["accuracies"] if attack_title(name) == row["accuracy under"]}
    x = [run["quantities"][key_of(row["quantity"])] for run in runs]
    y = [run["accuracies"][attack][0] / run["accuracies"][attack][1] for run in runs]
    rho = stats.spearmanr(x, y).statistic
    assert row["ρ"].split()[0] == f"{rho:+.2f}"
    assert int(row["runs"]) == len(runs)
    asymptotic = stats.spearmanr(x, y).pvalue  # from Student's distribution, close to that of the permutations
    assert float(row["p"]) == pytest.approx(asymptotic, abs=0.06)


def test_the_page_shows_all_rows_and_reads_them_correctly() -> None:
    for row in ROWS:
        assert f"| {' | '.join(row.values())} |" in PAGE
    assert {row["larger goes with"] for row in ROWS} == {"undecided"}
    assert "every row is undecided" in " ".join(PAGE.split())
    for rows in RECORD["layers"].values():
        (last,) = (row for row in rows if row["layer"] == "model.layer4.1.conv2")
        assert last["effective_norm"] > 2 * last["weight_norm"]
    assert len(ROWS) * 2 / math.factorial(len(RECORD["runs"])) < 0.05
