"""Verdicts of several runs: those of single runs summed up, and weight decay by votes of samples, computed anew."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, spearmanr

from lightning_normgeo import Thresholds, read_record, verdicts
from lightning_normgeo.report import study_verdicts
from lightning_normgeo.runs.verdicts.verdict import Verdict
from support.evaluated_runs import write_run

ORTHOGONAL = {
    "orthogonality/max_abs_cos": [(k, 1e-5) for k in range(12)],
    "orthogonality_control/max_abs_cos": [(k, 0.4) for k in range(12)],
}
VIOLATED = {**ORTHOGONAL, "orthogonality/max_abs_cos_corrected": [(k, 0.2) for k in range(12)]}


def judged(folders: list[Path], **limits: Any) -> dict[str, Verdict]:
    return study_verdicts([read_record(folder) for folder in folders], Thresholds(**limits))


def pair(norm: str, without: float, decayed: float, kind: str = "bim", n: int = 300, **more: Any) -> list[Path]:
    shares = {"clean": 1.0, kind: without}
    others = {"clean": 1.0, kind: decayed}
    return [
        write_run(f"{norm}-0", norm=norm, shares=shares, n=n, **more),
        write_run(f"{norm}-1", norm=norm, shares=others, n=n, decay=0.1, **more),
    ]


def votes(folders: list[Path], attack: str) -> tuple[int, int, float]:
    """Return the samples won and lost with weight decay over all pairs, and the mean difference, from the files."""
    total, differences = np.zeros(0), []
    for without, decayed in zip(folders[::2], folders[1::2], strict=True):
        right = []
        for folder in (without, decayed):
            with np.load(folder / "robustness.npz") as file:
                right.append((file[f"{attack}/prediction"] == file["label"]).astype(int))
        total = right[1] - right[0] + (total if len(total) else 0)
        differences.append(float((right[1] - right[0]).mean()))
    return int((total > 0).sum()), int((total < 0).sum()), float(np.mean(differences))


@pytest.mark.parametrize(
    ("shares", "word"),
    [
        ([(0.3, 0.6), (0.3, 0.5)], "supported"),
        ([(0.6, 0.3), (0.5, 0.3)], "refuted"),
        ([(0.5, 0.5)], "undecided"),
        ([(0.2, 0.9), (0.7, 0.4)], "undecided"),  # pairs in opposite directions
    ],
)
@pytest.mark.parametrize(("claim", "attack"), [("decay_attack", "bim"), ("decay_noise", "gaussian")])
def test_weight_decay_is_judged_by_the_votes_of_samples(
    shares: list[tuple[float, float]], word: str, claim: str, attack: str
) -> None:
    folders = [f for k, (a, b) in enumerate(shares) for f in pair(("bn", "gn")[k], a, b, attack)]
    found = judged(folders)[claim]
    won, lost, difference = votes(folders, attack)
    assert found.word == word, found
    assert found.value == pytest.approx(difference, abs=1e-12)
    assert f"{won} samples won, {lost} lost" in found.detail
    assert found.p_value == pytest.approx(binomtest(won, won + lost).pvalue, rel=1e-9)
    other = {"decay_attack": "decay_noise", "decay_noise": "decay_attack"}[claim]
    assert judged(folders)[other].word == "not tested"


def test_p_values_are_adjusted_for_the_number_of_verdicts() -> None:
    shares = ({"clean": 1.0, "gaussian": 0.5, "bim": 0.3}, {"clean": 1.0, "gaussian": 0.53, "bim": 0.5})
    folders = [write_run(f"r{k}", decay=0.1 * k, shares=shares[k], n=400) for k in (0, 1)]
    found = judged(folders)
    raw = []
    for attack in ("gaussian", "bim"):
        won, lost, _ = votes(folders, attack)
        raw.append(binomtest(won, won + lost).pvalue)
    small, large = sorted(raw)
    expected = {small: 2 * small, large: max(2 * small, large)}
    assert [found[key].p_value for key in ("decay_noise", "decay_attack")] == pytest.approx([expected[p] for p in raw])


def test_a_single_run_or_one_that_differs_in_more_is_no_pair() -> None:
    one, other = pair("bn", 0.3, 0.6)
    assert judged([one])["decay_attack"].word == "not tested"
    assert judged([one])["decay_attack"].number.endswith(" pt")
    stranger = write_run("gn-1", norm="gn", decay=0.1, shares={"clean": 1.0, "bim": 0.6}, n=300)
    assert judged([one, stranger])["decay_attack"].word == "not tested"
    assert judged([one, other])["decay_attack"].word == "supported"


def test_more_decay_against_less_is_not_decay_against_none() -> None:
    runs = [write_run(f"r{k}", decay=decay, n=300) for k, decay in enumerate((0.1, 0.5))]
    assert judged(runs)["decay_attack"].word == "not tested"


def test_pairs_without_samples_cannot_be_compared() -> None:
    folders = pair("bn", 0.3, 0.6)
    (folders[0] / "robustness.npz").unlink()
    found = judged(folders)["decay_attack"]
    assert (found.word, found.reason) == ("undecided", "pairs cannot be compared")
    assert "there is no robustness.npz" in found.detail


def test_claims_about_single_runs_need_a_majority_without_contradiction() -> None:
    kinds: dict[str, dict[str, Any]] = {
        "good": ORTHOGONAL,
        "bad": VIOLATED,
        "open": {"orthogonality/max_abs_cos": [(k, 1e-5) for k in range(12)]},
        "none": {"train/loss": [(0, 1.0)]},
    }
    written = {
        (kind, k): write_run(f"{kind}{k}", seed=k, metrics=curves, shares={})
        for kind, curves in kinds.items()
        for k in range(3)
    }

    def of(**counts: int) -> Verdict:
        return judged([written[kind, k] for kind, count in counts.items() for k in range(count)])["orthogonality"]

    assert (of(good=3).word, of(good=3).runs) == ("supported", "3 of 3 runs")
    assert (of(bad=3).word, of(bad=2, open=1).word) == ("refuted", "refuted")
    assert (of(good=2, open=1).runs, of(good=2, open=1).detail) == ("2 of 3 runs", "Runs: 2 supported, 1 undecided.")
    assert of(good=1, open=1).word == "undecided"
    torn = of(good=3, bad=1)
    assert (torn.word, torn.reason, torn.runs) == ("undecided", "runs contradict each other", "4 runs")
    assert of(good=1, none=2).detail == "2 more runs do not test it."
    assert of(good=1, none=1).detail == "1 more run does not test it."
    assert of(none=2).word == "not tested"
    assert of(good=1) == verdicts(read_record(written["good", 0]))["orthogonality"]


def test_counts_that_old_records_lack_are_read_from_the_samples() -> None:
    shares = {"clean": 0.9, "bim": 0.5, "clean_rescaled": 0.9, "bim_rescaled": 0.5}
    folder = write_run("one", shares=shares, n=400)
    record = read_record(folder)
    with np.load(folder / "robustness.npz") as file:
        right = {attack: file[f"{attack}/prediction"] == file["label"] for attack in shares}
    changed = sum(int((right[a] != right[f"{a}_rescaled"]).sum()) for a in ("clean", "bim"))
    assert verdicts(record)["norm_cause"].reason == "paired counts missing"
    found = judged([folder])["norm_cause"]
    assert f"{changed} of 800 decisions differ" in found.detail
    assert found.reason == "too few samples"
    assert all("changed" not in json.dumps(row) for row in record.results["robustness"]["results"]), "records stay"


def test_thresholds_decide() -> None:
    folders = pair("bn", 0.45, 0.55)
    p = judged(folders)["decay_attack"].p_value
    assert judged(folders, alpha=math.nextafter(p, 1))["decay_attack"].word == "supported"
    assert judged(folders, alpha=p)["decay_attack"].word == "undecided"


SPHERES = {"sphere/radius_error": [(k, 1e-8) for k in range(12)]}
CALLBACKS = {"trainer": {"callbacks": [{"class_path": "lightning_normgeo.SphereProjection"}]}}


@pytest.mark.parametrize(("free", "projected", "word"), [(0.5, 0.8, "supported"), (0.8, 0.5, "refuted")])
def test_spheres_are_judged_by_pairs_that_differ_in_callbacks_alone(free: float, projected: float, word: str) -> None:
    folders = [
        write_run("free", shares={"clean": free}, n=300),
        write_run("other", shares={"clean": free}, n=300, decay=0.1),
        write_run("sphere", shares={"clean": projected}, n=300, metrics=SPHERES, settings=CALLBACKS),
    ]
    found = judged(folders)["sphere_training"]
    won, lost, difference = votes([folders[0], folders[2]], "clean")
    assert found.word == word
    assert found.value == pytest.approx(difference, abs=1e-12)
    assert f"{won} samples won, {lost} lost" in found.detail
    assert judged(folders[:2])["sphere_training"].word == "not tested"


def studied(effective: list[float], raw: list[float]) -> dict[str, Verdict]:
    """Return the verdicts of runs whose accuracy under attack falls from run to run."""
    metrics = [
        {"effective/weight_norm": [(9, a)], "effective/weight_norm_raw": [(9, b)]}
        for a, b in zip(effective, raw, strict=True)
    ]
    return judged(
        [
            write_run(f"run{k}", seed=k, shares={"clean": 1.0, "bim": 0.9 - 0.1 * k}, n=2000, metrics=one)
            for k, one in enumerate(metrics)
        ]
    )


def test_one_significant_correlation_beside_another_that_hardly_is_not_is_no_difference() -> None:
    found = studied([1.0, 3.0, 2.0, 5.0, 4.0, 7.0, 6.0], [4.0, 2.0, 1.0, 3.0, 5.0, 7.0, 6.0])["effective_weights"]
    assert (found.word, found.reason) == ("undecided", "no significant difference")


def test_norms_that_are_the_same_in_all_runs_have_no_correlation() -> None:
    found = studied([1.0] * 7, UP)["effective_weights"]
    assert (found.word, found.number) == ("undecided", "")
    assert found.reason == "a norm or the accuracy is the same in all runs"


UP, MIXED = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [3.0, 1.0, 5.0, 2.0, 6.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("effective", "raw", "word", "reason"),
    [
        (UP, MIXED, "supported", ""),
        (MIXED, UP, "refuted", ""),
        (UP, UP[::-1], "undecided", "both go with it"),
        (MIXED, MIXED, "undecided", "neither goes with it"),
        (UP[:4], UP[:4], "undecided", "too few runs: 4"),
    ],
)
def test_effective_weights_are_judged_by_rank_correlations(
    effective: list[float], raw: list[float], word: str, reason: str
) -> None:
    found = studied(effective, raw)["effective_weights"]
    assert (found.word, found.reason) == (word, reason)
    assert found.value == pytest.approx(float(spearmanr(effective, range(len(effective), 0, -1)).statistic))
