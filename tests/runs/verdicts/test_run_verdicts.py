"""Verdicts of a run: a record for each word of every claim with its number, and what forbids a verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo import read_record, verdicts
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.claims.claims import CLAIMS, VERDICT_KEYS
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import WORDS, Verdict
from lightning_normgeo.utilities.attack_names import control_of

N = 12
"""Measured steps of the records."""
COS, CORRECTED, CONTROL = (
    "orthogonality/max_abs_cos",
    "orthogonality/max_abs_cos_corrected",
    "orthogonality_control/max_abs_cos",
)
G = "norm_growth/"
G_CONTROL = "norm_growth_control/weight_norm"
PLAIN = {"class": "SGD", "settings": {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}}
DECAYED = {"class": "SGD", "settings": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005}}
ADAM = {"class": "Adam", "settings": {"lr": 0.1, "weight_decay": 0.0}}


def record(curves: dict[str, Any] | None = None, optimizer: Any = PLAIN, rows: Any = None, **values: Any) -> Record:
    """Return a record with curves: a number stands for a constant curve of N steps."""
    metrics = {
        key: list(zip(range(4, 5 * N, 5), [one] * N if isinstance(one, (int, float)) else one, strict=False))
        for key, one in (curves or {}).items()
    }
    found = {} if rows is None else {"robustness": {"results": rows, "settings": {"rescale": 10.0}}}
    weights = values.pop("logits", None)
    if weights is not None:
        found["robustness"]["weights"] = {"rescaled": {"largest_logit_change": weights}}
    observed = {"optimizers": [optimizer], "precision": values.pop("precision", "32-true")}
    observed |= {"trained_affine": values.pop("trained")} if "trained" in values else {}
    return Record(Path("run"), metrics=metrics, results=found, observations=[observed], **values)


def of(claim: str, one: Record, **limits: Any) -> Verdict:
    return verdicts(one, Thresholds(**limits))[claim]


def spike(value: float, at: float, count: int = 2) -> list[float]:
    return [at] * count + [value] * (N - count)


def row(attack: str, correct: int, n: int = 1000, **more: Any) -> dict[str, Any]:
    accuracy = correct / n
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    ends = {"ci_low": accuracy - half, "ci_high": accuracy + half}
    return {"attack": attack, "accuracy": accuracy, "n": n, "accuracy_drop": 0.8 - accuracy, **ends, **more}


def rescaled(change: int, changed: int | None, n: int = 1000) -> list[dict[str, Any]]:
    rows = [row("clean", 800, n), row("bim", 500, n)]
    more = {} if changed is None else {"changed": changed}
    return [*rows, row(control_of("clean"), 800, n, changed=0), row(control_of("bim"), 500 + change, n, **more)]


def channels(
    gamma: int, random: int | None, close: int = 1000, redundant: int = 3, other: int = 10, removed: int = 8
) -> Record:
    """Return the record of a channel evaluation: samples that are right with channels removed by |γ| and at random."""
    made = [("gamma", 0.05, 790, 2), ("gamma", 0.2, gamma, removed), ("gamma", 0.5, 10, 20), ("random", 0.2, random, 8)]
    rows = [
        {**row("", correct), "criterion": name, "replace": "zero", "ratio": ratio, "removed": count}
        for name, ratio, correct, count in made
        if correct is not None
    ]
    pairs = {"pairs": 5000, "close": close, "correlated": redundant + other, "redundant": redundant}
    return replace(record(), results={"channels": {"clean": row("", 800), "results": rows, "pairs": pairs}})


GROWTH = {G + "weight_norm": [10 + 0.1 * k for k in range(N)], G + "increment": 2.0, G + "storage_floor": 1e-6}
TURN = {G + "angular_update": 0.01, G + "equilibrium_angle": 0.01, G + "steps_to_equilibrium": 10.0}
WIDTH = "batch_geometry/"
SHARE = WIDTH + "kernel_share_mean"
NARROW = {WIDTH + "samples_over_inputs": 0.3, WIDTH + "rank_over_inputs": 0.3}
FALLING = [0.01 * 0.9**k for k in range(N)]
GAMMA, RATIO = "affine/abs_gamma2_minus_sigma2_median", "affine/gamma2_over_sigma2_median"
BETA, NORM = "affine/abs_beta_minus_mu_median", G + "weight_norm"

CASES: list[tuple[str, str, Record, float | None]] = [
    # the claim, the word, the record, and the number
    ("orthogonality", "supported", record({COS: spike(2e-6, 3e-5), CONTROL: 0.3}), 3e-5),
    ("orthogonality", "supported", record({COS: 0.2, CORRECTED: spike(1e-6, -9e-4, 1), CONTROL: 0.3}), 9e-4),
    ("orthogonality", "supported", record({COS: 4e-3, CONTROL: 0.3}, precision="bf16-mixed"), 4e-3),
    ("orthogonality", "refuted", record({COS: 4e-3, CORRECTED: 4e-3, CONTROL: 0.3}, precision="64-true"), 4e-3),
    ("orthogonality", "refuted", record({COS: 0.2, CORRECTED: 0.1, CONTROL: 0.3}), 0.1),
    ("orthogonality", "undecided", record({COS: 0.2, CONTROL: 0.3}), 0.2),  # may be ε
    ("orthogonality", "undecided", record({COS: 3e-5, CONTROL: 1e-4}), 3e-5),  # a control that is no control
    ("orthogonality", "undecided", record({COS: 3e-5}), 3e-5),
    ("orthogonality", "undecided", record({COS: spike(1e-5, 2e-3), CORRECTED: spike(1e-5, 2e-3), CONTROL: 0.3}), 2e-3),
    ("orthogonality", "not applicable", record({CONTROL: 0.3}), None),
    ("orthogonality", "not tested", record(), None),
    ("charges", "supported", record({"symmetry/max_charge": 1e-6, "symmetry/max_uncanceled": 0.2}), 1e-6),
    ("charges", "refuted", record({"symmetry/max_charge": 0.1, "symmetry/max_uncanceled": 0.2}), 0.1),
    ("charges", "undecided", record({"symmetry/max_charge": 0.015, "symmetry/max_uncanceled": 0.3}), 0.015),
    ("charges", "undecided", record({"symmetry/max_charge": 1e-6}), 1e-6),
    ("charges", "not tested", record(), None),
    ("equation_16", "supported", record({**GROWTH, G + "predicted": 2.001, G + "eq16_applies": 1.0}), 5e-4),
    ("equation_16", "refuted", record({**GROWTH, G + "predicted": 1.0, G + "eq16_applies": 1.0}), 0.5),
    ("equation_16", "undecided", record({**GROWTH, G + "predicted": 2.1, G + "eq16_applies": 1.0}), 0.05),
    ("equation_16", "undecided", record({**GROWTH, G + "predicted": 1.0, G + "storage_floor": 0.1}), 0.5),
    ("equation_16", "not applicable", record({**GROWTH, G + "predicted": 1.0, G + "eq16_applies": 0.0}, DECAYED), None),
    ("equation_16", "not applicable", record({G_CONTROL: 3.0}), None),
    ("increments", "not applicable", record({G_CONTROL: 3.0}), None),
    ("growth", "not applicable", record({G_CONTROL: 3.0}), None),
    ("equilibrium", "not applicable", record({G_CONTROL: 3.0}), None),
    ("increments", "not tested", record({**GROWTH, G_CONTROL: 3.0}), None),  # no formula for the optimizer
    ("equation_16", "not tested", record(), None),
    ("increments", "supported", record({**GROWTH, G + "residual": 1e-6}), 1 - 5e-7),
    ("increments", "refuted", record({**GROWTH, G + "residual": -1.0}), 0.5),
    ("increments", "undecided", record({**GROWTH, G + "residual": 1.0, G + "storage_floor": 0.5}), 0.5),
    ("increments", "not tested", record(), None),
    ("growth", "supported", record(GROWTH), 11.1 / 10),
    ("growth", "refuted", record({**GROWTH, NORM: [10 - 0.1 * k for k in range(N)], G + "increment": -2.0}), 0.89),
    ("growth", "undecided", record({**GROWTH, G + "increment": spike(2.0, -1.0)}), 1.11),
    ("growth", "not applicable", record(GROWTH, DECAYED), 1.11),
    ("growth", "not applicable", record(GROWTH, ADAM), 1.11),
    ("growth", "not applicable", record({**GROWTH, "sphere/radius_error": 1e-8}), 1.11),
    ("equilibrium", "not applicable", record({**TURN, "sphere/radius_error": 1e-8}, DECAYED), None),
    ("growth", "not tested", record(), None),
    ("equilibrium", "supported", record({**TURN, G + "angular_update": spike(0.011, 0.2, 5)}, DECAYED), 1.1),
    ("equilibrium", "refuted", record({**TURN, G + "angular_update": 0.1}, DECAYED), 10.0),
    ("equilibrium", "undecided", record({**TURN, G + "steps_to_equilibrium": 1000.0}, DECAYED), 1.0),
    ("equilibrium", "undecided", record({**TURN, G + "angular_update": 0.014}, DECAYED), 1.4),
    ("equilibrium", "undecided", record({**TURN, G + "equilibrium_angle": FALLING}), 0.9**-11),
    ("equilibrium", "not applicable", record({G + "angular_update": 0.01}), None),
    ("equilibrium", "not tested", record(), None),
    ("gamma_sigma", "supported", record({GAMMA: spike(0.05, 1.0), RATIO: spike(1.1, 4.0)}), 0.05),
    ("gamma_sigma", "refuted", record({GAMMA: spike(1.2, 1.0), RATIO: spike(5.0, 4.0), NORM: 10.0}), 1.2),
    ("gamma_sigma", "undecided", record({GAMMA: spike(1.2, 1.0), RATIO: spike(5.0, 4.0)}), 1.2),
    ("gamma_sigma", "not applicable", record({GAMMA: 1.0, RATIO: 4.0}, trained={"gamma": 0, "beta": 3}), None),
    ("beta_mu", "not applicable", record({BETA: 1.0}, trained={"gamma": 3, "beta": 0}), None),
    ("beta_mu", "supported", record({BETA: spike(0.05, 1.0)}, trained={"gamma": 0, "beta": 3}), 0.05),
    ("gamma_sigma", "undecided", record({GAMMA: spike(2.0, 1.0), RATIO: 5.0, NORM: spike(15.0, 10.0)}), 2.0),
    ("gamma_sigma", "undecided", record({GAMMA: spike(1.2, 1.0), RATIO: spike(1.1, 4.0), NORM: 10.0}), 1.2),
    ("gamma_sigma", "undecided", record({GAMMA: spike(0.05, 1.0), RATIO: 4.0}), 0.05),  # σ shrank
    ("gamma_sigma", "undecided", record({GAMMA: spike(0.5, 1.0), RATIO: spike(1.1, 4.0)}), 0.5),
    ("gamma_sigma", "not tested", record(), None),
    ("beta_mu", "supported", record({BETA: spike(0.05, 1.0)}), 0.05),
    ("beta_mu", "refuted", record({BETA: spike(1.3, 1.0), NORM: spike(10.1, 10.0)}), 1.3),
    ("beta_mu", "undecided", record({BETA: spike(1.3, 1.0), NORM: spike(20.0, 10.0)}), 1.3),  # μ grows with ‖W‖
    ("beta_mu", "undecided", record({BETA: spike(1.3, 1.0)}), 1.3),
    ("beta_mu", "undecided", record({BETA: spike(1.05, 1.0)}), 1.05),
    ("beta_mu", "not tested", record(), None),
    ("vulnerability", "supported", record(rows=[row("clean", 800), row("bim_a", 700), row("bim_b", 300)]), 0.5),
    ("vulnerability", "refuted", record(rows=[row("clean", 80000, 10**5), row("bim", 79900, 10**5)]), 0.001),
    ("vulnerability", "undecided", record(rows=[row("clean", 800), row("bim", 790)]), 0.01),
    ("vulnerability", "not tested", record(rows=[row("clean", 800)]), None),
    ("norm_cause", "refuted", record(rows=rescaled(-2, 4)), -0.002),
    ("norm_cause", "supported", record(rows=rescaled(-200, 200), logits=1e-4), -0.2),
    ("norm_cause", "undecided", record(rows=rescaled(-200, 200), logits=0.5), -0.2),  # ε changed the function
    ("norm_cause", "undecided", record(rows=rescaled(-200, 200)), -0.2),  # nobody knows
    ("norm_cause", "undecided", record(rows=rescaled(-2, None)), -0.002),
    ("norm_cause", "undecided", record(rows=rescaled(20, 40)), 0.02),
    ("norm_cause", "not tested", record(rows=[row("clean", 800)]), None),
    ("batch_rank", "supported", record({**NARROW, SHARE: 0.95}), 0.95),
    ("batch_rank", "refuted", record({**NARROW, SHARE: 0.2}), 0.2),
    ("batch_rank", "undecided", record({**NARROW, SHARE: 0.6}), 0.6),
    ("batch_rank", "undecided", record(NARROW), None),
    ("batch_rank", "not applicable", record({**NARROW, WIDTH + "rank_over_inputs": 1.0, SHARE: 0.0}), None),
    ("batch_rank", "not tested", record(), None),
    ("small_gamma", "supported", channels(780, 500), 0.02),
    ("small_gamma", "refuted", channels(600, 500), 0.2),
    ("small_gamma", "undecided", channels(400, 780, removed=16), 0.4),  # equal |γ|, as of frozen γ
    ("small_gamma", "supported", channels(798, 700, removed=16), 0.002),  # more zeros than were to be removed
    ("small_gamma", "undecided", channels(780, 790), 0.02),  # nothing costs anything
    ("small_gamma", "undecided", channels(760, 500), 0.04),
    ("small_gamma", "undecided", channels(780, None), 0.02),
    ("small_gamma", "not tested", record(), None),
    ("similar_channels", "supported", channels(780, 500, 1000, 700), 0.7),
    ("similar_channels", "refuted", channels(780, 500, 1000, 3), 0.003),
    ("similar_channels", "undecided", channels(790, 500, close=5000, redundant=3), 0.0006),  # nothing to compare with
    ("similar_channels", "undecided", channels(790, 500, close=5000, redundant=4900), 0.98),
    ("similar_channels", "undecided", channels(780, 500, 1000, 300), 0.3),
    ("similar_channels", "undecided", channels(780, 500, 1000, 700, other=3000), 0.7),
    ("similar_channels", "undecided", channels(780, 500, 1, 1, other=1500), 1.0),
    ("similar_channels", "undecided", channels(780, 500, 5000, 4000, other=0), 0.8),
    ("similar_channels", "not tested", channels(780, 500, 0, 0), None),
    ("decay_noise", "not tested", record(rows=[row("clean", 800), row("gaussian", 700)]), 0.1),
    ("decay_attack", "not tested", record(rows=[row("clean", 800), row("gaussian", 700), row("bim", 600)]), 0.2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "word", "one", "value"), CASES, ids=[f"{c}-{w}-{k}" for k, (c, w, _, _) in enumerate(CASES)]
)
def test_each_word_of_every_claim(claim: str, word: str, one: Record, value: float | None) -> None:
    found = of(claim, one)
    assert found.word == word, found
    assert found.value == pytest.approx(value, rel=1e-9) if value is not None else math.isnan(found.value)
    assert bool(found.reason) != (word in ("supported", "refuted"))
    assert bool(found.evidence) != (word == "not tested" and value is None)


def test_every_claim_has_all_words_that_a_run_can_give() -> None:
    words: dict[str, set[str]] = {}
    for claim, word, _, _ in CASES:
        words.setdefault(claim, set()).add(word)
    for key, claim in CLAIMS.items():
        if claim.judge is None or claim.stage == "study":
            continue
        assert {"supported", "refuted", "undecided", "not tested"} <= words[key], key


def test_claims_without_a_tool_say_what_they_need() -> None:
    found = verdicts(record())
    assert list(found) == list(CLAIMS)
    assert {one.word for one in found.values()} == {"not tested"}
    assert all(one.reason == f"needs {CLAIMS[key].needs}" for key, one in found.items())


@pytest.mark.parametrize(("claim", "word", "one", "value"), CASES)
def test_a_run_that_diverged_or_was_hardly_measured_decides_nothing(
    claim: str, word: str, one: Record, value: float | None
) -> None:
    metrics = one.metrics | {"train/loss": [(0, 1.0), (7, math.nan)]}
    diverged = of(claim, Record(one.folder, metrics, results=one.results, observations=one.observations))
    few = of(claim, one, min_steps=N + 1)
    if word in ("supported", "refuted"):
        assert (diverged.word, diverged.reason) == ("undecided", "diverged at step 7")
        assert few.word == ("undecided" if CLAIMS[claim].stage == "training" else word)
        assert diverged.number == of(claim, one).number
    else:
        assert diverged.word == few.word == word


ONCE = [
    ("growth", record({NORM: [10.0], G + "increment": [0.1]}), "1 of 10 needed steps"),
    ("gamma_sigma", record({GAMMA: [1.0], RATIO: [2.0]}), "1 of 10 needed steps"),
    ("beta_mu", record({BETA: [1.0]}), "1 of 10 needed steps"),
    ("beta_mu", record({BETA: spike(1.0, 0.0)}), "the distance began at 0"),
    ("increments", record({**GROWTH, G + "increment": 0.0, G + "residual": 0.0}), "the norm does not change"),
    ("growth", record({**GROWTH, NORM: 10.0, G + "increment": 0.0}), "the norm does not change"),
    ("growth", record({**GROWTH, NORM: spike(9.0, 10.0)}), "no larger at the end"),  # between measured steps
]


@pytest.mark.parametrize(("claim", "one", "reason"), ONCE)
def test_what_was_measured_and_decides_nothing_is_undecided_and_not_untested(
    claim: str, one: Record, reason: str
) -> None:
    found = of(claim, one)
    assert (found.word, found.reason) == ("undecided", reason)
    assert found.evidence


FEW = {
    "equation_16": record({**GROWTH, G + "predicted": 2.0, G + "eq16_applies": spike(0.0, 1.0, 5)}),
    "increments": record({**GROWTH, G + "residual": [0.0] * 5}),
    "orthogonality": record({COS: 0.1, CORRECTED: [1e-6] * 5, CONTROL: 0.3}),
    "equilibrium": record(
        {**TURN, G + "equilibrium_angle": [0.02] * 7 + [0.01] * 5, G + "steps_to_equilibrium": 5.0}, DECAYED
    ),
    "batch_rank": record({**NARROW, SHARE: [0.95] * 5}),
}


@pytest.mark.parametrize("claim", FEW)
def test_only_the_steps_that_a_number_is_made_from_are_counted(claim: str) -> None:
    assert of(claim, FEW[claim]).reason == "5 of 10 needed steps"
    assert of(claim, FEW[claim], min_steps=5).word == "supported"


@pytest.mark.parametrize(
    ("claim", "one", "limits", "phrase"),
    [
        ("orthogonality", record({COS: 1.04e-3, CONTROL: 0.3}), {}, "max |cos| 1.04e-03: 12 of 12 steps above"),
        ("orthogonality", record({COS: 1e-3, CONTROL: 0.3}), {}, "max |cos| 1.0e-03 (limit 1e-03)"),
        (
            "orthogonality",
            record({COS: 1.4e-3, CONTROL: 0.3}),
            {"cos_single": 1.5e-3},
            "max |cos| 1.4e-03 (limit 1.5e-03)",
        ),
        ("equation_16", record({**GROWTH, G + "predicted": 2.02098}), {}, "error 1.05e-02: near the limit"),
        ("increments", record({**GROWTH, G + "residual": 0.0207}), {}, "share 98.97 %: near the limit"),
        ("increments", record({**GROWTH, G + "residual": 2e-9}), {}, "share > 99.999999 % (least 99 %)"),
        ("increments", record({**GROWTH, G + "residual": 0.0}), {}, "share 100.0 % (least 99 %)"),
        ("growth", record({**GROWTH, NORM: spike(1.0 + 2e-9, 1.0)}), {}, "‖W‖ × 1.000000002 (only growing)"),
        ("growth", record({**GROWTH, G + "increment": spike(2.0, -1.0, 1)}), {}, "‖W‖ × 1.1100: 1 shrinking step"),
        (
            "equilibrium",
            record({**TURN, G + "steps_to_equilibrium": 55 / 2.98}, DECAYED),
            {},
            "angle 1 ×: 2.98 of 3 time constants",
        ),
        ("equilibrium", record({**TURN, G + "angular_update": 1.23}, DECAYED), {}, "angle 120 × (1 within × 1.25)"),
        ("beta_mu", record({BETA: spike(0.10004, 1.0)}), {}, "end/start 0.10004: neither small nor grown"),
        (
            "beta_mu",
            record({BETA: spike(2.3, 1.0), NORM: spike(20.0, 10.0)}),
            {},
            "end/start 2.3 (refuted from 2.2)",
        ),
        (
            "gamma_sigma",
            record({GAMMA: spike(6.0, 1.0), RATIO: spike(5.0, 4.0), NORM: spike(20.0, 10.0)}),
            {},
            "end/start 6 (refuted from 4.4)",
        ),
        ("batch_rank", record({**NARROW, SHARE: 0.997}), {}, "in the kernel 99.7 % (least 90 %)"),
        ("batch_rank", record({**NARROW, SHARE: 0.8996}), {}, "in the kernel 89.96 %: neither in nor out"),
        ("similar_channels", channels(780, 500, 1, 1), {}, "also alike 100 % (least 50 %)"),
        ("similar_channels", channels(780, 500, 1000, 499), {}, "also alike 49.9 %: neither many nor few"),
        ("small_gamma", channels(770, 500), {}, "lost 3.00 pt (at most 3 pt)"),
        ("small_gamma", channels(780, 500), {"accuracy_margin": 0.0205}, "lost 2.00 pt (at most 2.05 pt)"),
        ("small_gamma", channels(780, 770), {}, "lost 2.00 pt: intervals overlap"),
        ("small_gamma", channels(780, 790), {}, "lost 2.00 pt: random ones cost no more"),
        (
            "vulnerability",
            record(rows=[row("clean", 80000, 10**5), row("bim", 76996, 10**5)]),
            {},
            "lost 3.004 pt (more than 3 pt)",
        ),
        (
            "vulnerability",
            record(rows=[row("clean", 8000, 10**4), {**row("bim", 7700, 10**4), "accuracy_drop": 0.8 - 0.77}]),
            {},
            "lost 3.00 pt: not more than 3 pt",
        ),
        ("norm_cause", record(rows=rescaled(-200, 200), logits=1e-4), {}, "change -20.00 pt (more than 3 pt lost)"),
        ("norm_cause", record(rows=rescaled(-200, 200), logits=0.1), {}, "change -20.00 pt: ε changed outputs"),
        ("norm_cause", record(rows=rescaled(-200, 200)), {}, "change -20.00 pt: logits not compared"),
        ("norm_cause", record(rows=rescaled(200, 200), logits=1e-4), {}, "change +20.00 pt: an accuracy rises"),
        ("norm_cause", record(rows=rescaled(-20, 40)), {}, "change -2.00 pt: too few samples"),
    ],
)  # fmt: skip
def test_the_phrase_of_a_number_near_a_limit_is_on_its_side(
    claim: str, one: Record, limits: dict[str, float], phrase: str
) -> None:
    assert of(claim, one, **limits).phrase == phrase


def test_an_attack_is_compared_with_the_clean_samples_of_the_same_evaluation_and_loader() -> None:
    """The clean accuracy of another evaluation is of other samples."""
    strong = [row("clean", 600), {**row("bim", 590), "accuracy_drop": 0.01}]
    one = record(rows=[row("clean", 990), row("gaussian", 900)])
    one.results["robustness_strong"] = {"results": strong}
    assert of("vulnerability", one).word == "undecided"
    loaders = [row("clean/a", 800), row("bim/a", 790), row("clean/b", 800), row("bim/b", 300)]
    found = of("vulnerability", record(rows=loaders))
    assert (found.word, found.evidence) == ("supported", "bim/b and clean/b, n = 1000")


def test_where_equation_16_is_not_about_the_optimizer_the_law_that_holds_instead_is_said() -> None:
    curves = {**GROWTH, G + "predicted": 1.0, G + "eq16_applies": 0.0, G + "predicted_momentum": 1.9}
    found = of("equation_16", record(curves, DECAYED))
    assert found.reason == "momentum 0.9, weight decay 0.0005"
    assert "by 5.0e-02 of their sum" in found.detail  # |1.9 - 2| / 2


def test_without_a_curve_that_says_so_the_optimizers_tell_whether_equation_16_applies() -> None:
    """As in records of runs that were uploaded to W&B by an earlier version, which lack the curve or both."""
    curves = {**GROWTH, G + "predicted": 0.5}
    assert of("equation_16", record(curves)).word == "refuted"
    assert of("equation_16", record(curves, DECAYED)).reason == "momentum 0.9, weight decay 0.0005"
    unknown = record(curves)
    unknown.observations.clear()
    assert (of("equation_16", unknown).word, of("equation_16", unknown).reason) == (
        "undecided",
        "optimizer not recorded",
    )
    right = record({**GROWTH, G + "predicted": 2.0})
    right.observations.clear()
    assert of("equation_16", right).word == "supported"


def test_weights_with_an_equilibrium_have_weight_decay() -> None:
    """Records of earlier versions have the settings of the first parameter group, often that of biases."""
    one = record({**GROWTH, **TURN, G + "increment": -1.0, NORM: [10 - 0.1 * k for k in range(N)]})
    assert (of("growth", one).word, of("growth", one).reason) == ("not applicable", "weight decay")


def test_only_steps_that_equation_16_covers_are_counted() -> None:
    curves = {**GROWTH, G + "predicted": spike(2.0, 0.0, 6), G + "eq16_applies": spike(1.0, 0.0, 6)}
    assert of("equation_16", record(curves)).value == 0.0


def test_a_killed_run_of_plain_sgd_grows_without_its_optimizers() -> None:
    one = record({**GROWTH, G + "predicted": 2.0, G + "eq16_applies": 1.0})
    one.observations.clear()
    assert of("growth", one).word == "supported"
    assert of("equilibrium", record({G + "angular_update": 0.01})).reason == "no weight decay"
    unknown = record(GROWTH)
    unknown.observations.clear()
    assert of("growth", unknown).reason == "optimizer not recorded"


@pytest.mark.parametrize("junk", [None, 3, [3], [None], [{"class": 3, "settings": 4}], "text"])
def test_any_optimizer_of_a_record_is_put_up_with(junk: Any) -> None:
    one = record({**GROWTH, **TURN, G + "predicted": 1.0, G + "eq16_applies": 0.0})
    one.observations = [{"optimizers": junk, "precision": junk}]
    found = verdicts(one)
    assert found["equation_16"].word == "not applicable"
    assert {one.word for one in found.values()} <= set(WORDS)


def test_evaluations_on_no_samples_and_foreign_rows_say_nothing() -> None:
    found = verdicts(record(rows=[{"attack": "bim", "accuracy": None, "n": 0}, {"attack": 3}]))
    assert {one.word for one in found.values()} == {"not tested"}


@pytest.mark.parametrize(
    ("right", "counts", "word"),
    [
        (86, [100] * 10, "undecided"),  # untrained
        (115, [100] * 10, "undecided"),  # its interval begins at 0.095
        (130, [100] * 10, "supported"),
        (890, [900, 100], "undecided"),  # always the frequent class
        (950, [900, 100], "supported"),
        (900, [1000], "supported"),  # guessing is no notion with one class
        (900, [], "supported"),
    ],
)
@pytest.mark.parametrize("attacked", [0, None])
def test_attacks_on_a_network_that_only_guesses_decide_nothing(
    right: int, counts: list[int], word: str, attacked: int | None
) -> None:
    classes = {str(k): [0, of] for k, of in enumerate(counts)}
    left = right if attacked is None else attacked
    drop = {"accuracy_drop": (right - left) / 1000}
    rows = [row("clean", right, by_class=classes), {**row("bim", left), **drop}]
    found = of("vulnerability", record(rows=rows), accuracy_margin=0.08)
    assert found.word == ("refuted" if attacked is None and word == "supported" else word)
    assert found.reason == ("clean accuracy no better than guessing" if word == "undecided" else "")


def test_the_precision_of_the_training_chooses_the_limit() -> None:
    limits = {
        name: of("orthogonality", record({COS: 1e-5, CONTROL: 0.5}, precision=name)).limit
        for name in ("64-true", "32", "16-mixed")
    }
    assert limits == {"64-true": "limit 1e-10", "32": "limit 1e-03", "16-mixed": "limit 2e-02"}
    own = record({COS: 1e-5, CONTROL: 0.5}, settings={"config": {"trainer": {"precision": 64}}})
    own.observations.clear()
    assert of("orthogonality", own).limit == "limit 1e-10"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_steps", 1),
        ("min_steps", 2.5),
        ("cos_single", 0),
        ("far", 1),
        ("alpha", 1),
        ("accuracy_margin", -0.1),
        ("affine_growth", 0.9),
        ("cos_half", math.inf),
        ("cos_half", "x"),
    ],
)
def test_thresholds_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"thresholds\.{name}=.* must be a .*Default: "):
        Thresholds(**{name: value})


def test_every_threshold_is_used_and_has_an_origin() -> None:
    names = set(Thresholds.__dataclass_fields__)
    assert {name for claim in CLAIMS.values() for name in claim.thresholds} == names
    assert all(one.metadata["origin"] for one in Thresholds.__dataclass_fields__.values())
    for claim in CLAIMS.values():
        assert all(name in claim.rule or name.startswith(("cos_", "min_")) for name in claim.thresholds), claim.key


@given(
    cosines=st.lists(st.floats(0, 1), min_size=10, max_size=20),
    control=st.floats(0, 1),
    limit=st.floats(1e-9, 0.1),
    longer=st.floats(1, 100),
)
def test_a_looser_limit_never_turns_support_of_lemma_3_away_nor_a_control_nearer_to_zero_decides(
    cosines: list[float], control: float, limit: float, longer: float
) -> None:
    one = record({COS: cosines, CORRECTED: cosines, CONTROL: control})
    strict = of("orthogonality", one, cos_single=limit)
    expected = "undecided"
    if control >= 10 * limit:
        ordered = sorted(cosines[:N])
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        expected = "supported" if max(ordered) <= limit else "refuted" if middle > 10 * limit else "undecided"
    assert strict.word == expected
    if strict.word == "supported" and control >= 10 * limit * longer:
        assert of("orthogonality", one, cos_single=limit * longer).word == "supported"


def test_verdicts_need_no_other_keys() -> None:
    curves = dict.fromkeys(VERDICT_KEYS, 0.5)
    others = {"norm_growth/explained": 3.0, "orthogonality/rms_cos": 0.1}
    assert verdicts(record(curves)) == verdicts(record(curves | others))


def test_a_phrase_fits_the_terminal() -> None:
    for claim, _, one, _ in CASES:
        found = of(claim, one)
        assert len(CLAIMS[claim].title) <= 26
        if found.word != "not tested":
            assert 16 + 25 + len(found.phrase) <= 80, found.phrase


def test_read_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"record\.jsonl"):
        verdicts(read_record(tmp_path))
