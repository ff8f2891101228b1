"""The table of norms that go with robustness: each number recomputed from the records, by scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_normgeo.report.compared_runs import load_runs
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.tables.accuracies.evaluations import evaluations_of
from lightning_normgeo.report.tables.correlations import correlation_tables, strongest_attack
from lightning_normgeo.report.tables.table import Table
from lightning_normgeo.robustness.results.statistics.statistics import holm
from support.evaluated_runs import correct, write_run

ATTACKS = {"clean": 0.9, "gaussian": 0.8, "bim_eps0.00784": 0.5, "bim_eps0.5": 0.0}


def study(count: int, quantities: Any = None, **settings: Any) -> list[Any]:
    """Runs whose effective norm falls with their accuracy under attack, and whose raw norm does not."""
    generator, folders = np.random.default_rng(3), []
    for k in range(count):
        shares = {**ATTACKS, "bim_eps0.00784": (k + 1) / (count + 1)}
        metrics = {
            "effective/weight_norm": [(3, 1.0), (9, 100.0 - k)],
            "effective/weight_norm_raw": [(9, float(generator.normal()))],
            "effective/last_layer_norm": [(9, 2.0)],
        }
        if quantities is not None:
            metrics = quantities(k, metrics)
        folders.append(write_run(f"run{k}", seed=k, n=400, shares=shares, metrics=metrics, **settings))
    return load_runs(folders)


def table_of(runs: list[Any]) -> Table:
    (table,) = correlation_tables(evaluations_of(runs))
    return table


def rows_of(table: Table) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row[0].text, row[1].text): dict(zip(table.columns, row, strict=True)) for row in table.rows}


def accuracies(runs: list[Any], attack: str) -> list[float]:
    return [float(correct(run, attack).mean()) for run in runs]


def test_each_number_is_recomputed_from_the_records() -> None:
    runs = study(8)
    table = table_of(runs)
    rows = rows_of(table)
    assert table.anchor == "correlations"
    assert {quantity for quantity, _ in rows} == {"‖W'‖, effective", "‖W‖, raw", "‖W‖ of the last layer"}
    assert {attack for _, attack in rows} == {"gaussian", "bim, ε = 2/255"}
    p_values = {}
    for (quantity, attack), row in rows.items():
        if quantity == "‖W‖ of the last layer":
            assert row["larger goes with"].text == "the same in all runs"
            continue
        key = {"‖W'‖, effective": "effective/weight_norm", "‖W‖, raw": "effective/weight_norm_raw"}[quantity]
        x = [run.record.metrics[key][-1][1] for run in runs]
        y = accuracies(runs, "gaussian" if attack == "gaussian" else "bim_eps0.00784")
        assert row["ρ"].value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert row["runs"].value == 8
        p_values[quantity, attack] = row["p"].value
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    for key, p in adjusted.items():
        assert rows[key]["p (Holm)"].value == pytest.approx(p)
    found = rows["‖W'‖, effective", "bim, ε = 2/255"]
    assert found["ρ"].value < -0.9
    assert found["larger goes with"].text == "a lower accuracy"
    assert rows["‖W‖, raw", "bim, ε = 2/255"]["larger goes with"].text == "undecided"
    assert "too few" not in table.caption


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_too_few_runs_are_called_too_few(count: int) -> None:
    table = table_of(study(count))
    verdicts = {row[-1].text for row in table.rows}
    assert verdicts <= {"too few runs", "the same in all runs"}
    assert f"With {count} runs no p-value of a rank correlation is below 2/n! = {2 / math.factorial(count):.2g}" in (
        table.caption
    )


def test_quantities_that_only_some_runs_have_count_these_runs() -> None:
    def some(k: int, metrics: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in metrics.items() if key != "effective/weight_norm" or k > 3}

    rows = rows_of(table_of(study(8, some)))
    assert rows["‖W'‖, effective", "gaussian"]["runs"].value == 4
    assert rows["‖W'‖, effective", "gaussian"]["larger goes with"].text == "too few runs"
    assert rows["‖W‖, raw", "gaussian"]["runs"].value == 8


def test_the_strongest_attack_is_one_that_tells_runs_apart() -> None:
    evaluations = evaluations_of(study(4))
    assert strongest_attack(evaluations) == "bim_eps0.00784"
    only_clean = [write_run(f"c{k}", shares={"clean": 0.9}) for k in range(2)]
    assert strongest_attack(evaluations_of(load_runs(only_clean))) is None


def test_reports_without_effective_weights_or_with_one_run_have_no_such_table() -> None:
    runs = load_runs([write_run("a"), write_run("b", seed=1)])
    assert correlation_tables(evaluations_of(runs)) == []
    assert correlation_tables(evaluations_of(study(1))) == []
    assert "correlations" not in {table.anchor for table in all_tables(runs)}
    assert "correlations" in {table.anchor for table in all_tables(study(3))}


def test_each_data_set_has_its_own_table() -> None:
    folders = [
        write_run(
            f"{data}{k}",
            seed=k,
            metrics={"effective/weight_norm": [(9, float(k))]},
            settings={"data": {"init_args": {"name": data}}},
        )
        for data in ("cifar10", "cifar100")
        for k in range(3)
    ]
    tables = correlation_tables(evaluations_of(load_runs(folders)))
    assert [table.anchor for table in tables] == ["correlations-cifar-10", "correlations-cifar-100"]
