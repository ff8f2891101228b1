"""Findings of a run say what its record holds: each number is computed anew here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.runs.findings.run_findings import Finding, findings_of, joint_findings
from lightning_normgeo.runs.record import Record
from lightning_normgeo.utilities.attack_names import control_of

MEASURED = {
    "orthogonality/max_abs_cos": [(0, 2e-5), (5, -8e-5), (9, 1e-5)],
    "orthogonality_control/max_abs_cos": [(0, 0.1), (5, 0.25)],
    "norm_growth/weight_norm": [(0, 10.0), (9, 12.5)],
    "norm_growth/increment": [(0, 2.0), (5, -1.0), (9, 1.0)],
    "norm_growth/residual": [(0, 1e-6), (5, -2e-6), (9, 1e-6)],
    "norm_growth/storage_floor": [(0, 1e-5), (5, 4e-6), (9, 1e-5)],
    "norm_growth/predicted": [(0, 1.0), (5, 0.5), (9, 0.5)],
    "norm_growth/eq16_applies": [(0, 1.0), (5, 1.0), (9, 1.0)],
    "affine/gamma2_over_sigma2_median": [(0, 4.0), (9, 2.5)],
}
SGD = {"class": "SGD", "settings": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005}}


def row(attack: str, correct: int, clean: int = 80) -> dict[str, Any]:
    accuracy = correct / 100
    drop = (clean - correct) / 100
    return {"attack": attack, "accuracy": accuracy, "n": 100, "accuracy_drop": drop, "ci_low": 0.1, "ci_high": 0.9}


def record(metrics: dict[str, Any] | None = None, rows: list[Any] | None = None, **values: Any) -> Record:
    found = {} if rows is None else {"robustness": {"results": rows, "settings": {"rescale": 10.0}}}
    return Record(Path("run"), metrics=MEASURED if metrics is None else metrics, results=found, **values)


def by_topic(one: Record) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings_of(one)}


def test_each_number_is_that_of_the_record() -> None:
    found = by_topic(record())
    assert list(found) == ["W ⟂ ∇W", "Increments explained", "Eq 16", "Norm growth", "γ against σ"]
    assert found["W ⟂ ∇W"].value == 8e-5
    assert "2.5e-01" in found["W ⟂ ∇W"].detail
    assert found["Increments explained"].value == pytest.approx(1 - 4e-6 / 4)
    assert found["Increments explained"].number == "99.99990 %"
    assert "at most 0.5 ×" in found["Increments explained"].detail
    assert found["Eq 16"].value == pytest.approx((1 + 0.5 + 0.5) / (2 - 1 + 1))
    assert (found["Norm growth"].value, found["γ against σ"].value) == (1.25, 2.5)


def test_where_equation_16_is_not_about_the_optimizer_the_reason_and_its_extension_are_said() -> None:
    metrics = MEASURED | {"norm_growth/eq16_applies": [(0, 0.0)], "norm_growth/predicted_momentum": [(0, 1.9), (5, -1)]}
    finding = by_topic(record(metrics, observations=[{"optimizers": [SGD]}]))["Eq 16"]
    assert finding.number == "not covered"
    assert "momentum 0.9 and weight decay 0.0005" in finding.detail
    assert "0.90000 × the measured" in finding.detail  # (1.9 - 1) / (2 - 1)


@pytest.mark.parametrize("junk", [None, 3, [3], [None], [{"class": 3, "settings": 4}], "text"])
def test_any_optimizer_of_a_record_is_put_up_with(junk: Any) -> None:
    metrics = MEASURED | {"norm_growth/eq16_applies": [(0, 0.0)]}
    assert by_topic(record(metrics, observations=[{"optimizers": junk}]))["Eq 16"].number == "not covered"


def test_the_part_of_epsilon_is_mentioned_only_where_it_matters() -> None:
    small = MEASURED | {"orthogonality/max_abs_cos_corrected": [(0, 1e-6), (5, 2e-6)]}
    alike = MEASURED | {"orthogonality/max_abs_cos_corrected": [(0, 7e-5)]}
    assert "2.0e-06 without the part of ε" in by_topic(record(small))["W ⟂ ∇W"].detail
    assert "ε" not in by_topic(record(alike))["W ⟂ ∇W"].detail


def test_a_network_without_scale_invariant_weights_is_not_judged() -> None:
    finding = by_topic(record({"orthogonality_control/max_abs_cos": [(0, 0.2)]}))["W ⟂ ∇W"]
    assert finding.number == "not covered"
    assert findings_of(record({})) == []


def test_robustness_is_the_largest_drop_of_noise_and_of_attacks_without_controls() -> None:
    rows = [row("clean", 80), row("gaussian", 79), row("bim_eps0.01", 60), row("bim_eps0.03", 20)]
    rows += [row(control_of(one["attack"]), round(100 * one["accuracy"]) - 1) for one in rows]
    found = by_topic(record({}, rows))
    assert (found["Noise"].value, found["Attack"].value) == (pytest.approx(1), pytest.approx(60))
    assert "bim, ε = 0.03" in found["Attack"].quantity
    assert found["Rescaled weights"].value == pytest.approx(1)
    assert "10 × longer" in found["Rescaled weights"].quantity


def test_evaluations_on_no_samples_and_foreign_rows_say_nothing() -> None:
    empty = {"attack": "bim", "accuracy": None, "n": 0}
    assert findings_of(record({}, [empty, {"attack": 3}])) == []


def test_several_runs_are_summed_up_by_their_smallest_and_largest_number() -> None:
    other = record(MEASURED | {"norm_growth/weight_norm": [(0, 10.0), (9, 10.0)], "norm_growth/eq16_applies": [(0, 0)]})
    found = {finding.topic: finding for finding in joint_findings([record(), other])}
    assert found["Norm growth"].number == "× 1.0000 … × 1.2500"
    assert found["Norm growth"].quantity.endswith("2 runs")
    assert found["Eq 16"].number == "1.00000"
    assert found["Eq 16"].detail == "In 1 more: not covered."
    assert joint_findings([other]) == findings_of(other)


def test_runs_under_different_attacks_are_summed_up_in_words_that_fit_both() -> None:
    runs = [record({}, [row("clean", 80), row(attack, correct)]) for attack, correct in (("bim", 50), ("pgd", 30))]
    (attack,) = joint_findings(runs)
    assert attack.number == "30.0 … 50.0"
    assert attack.quantity == "points of accuracy lost under the attack that takes most of a run, 2 runs"
