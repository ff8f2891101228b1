"""Every verdict of a real study, computed anew from the files of its runs, with JSON and NumPy and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from lightning_normgeo import (
    AffineConvergenceMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    RobustnessEvaluation,
    read_record,
)
from lightning_normgeo.report import study_verdicts
from support.projects import Project, images, sgd, trainer

Found = tuple[str, float]
"""The word and the number of a verdict."""


class Raw:
    """The files of one run, parsed without the package."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.curves, self.rows = folder, dict[str, dict[int, float]](), dict[str, Any]()
        self.decay, self.logits, self.kind = 0.0, math.nan, ()
        names: dict[str, list[str]] = {}
        for text in (folder / "record.jsonl").read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            values = line.get("values", {})
            if line["kind"] == "keys":
                names[line["keys"]] = line["names"]
            elif line["kind"] in ("metrics", "key_values"):
                named = values if line["kind"] == "metrics" else dict(zip(names[line["keys"]], values, strict=True))
                for key, value in named.items():
                    self.curves.setdefault(key, {})[line["step"]] = float(value)
            elif line["kind"] == "observation":
                self.decay = values["optimizers"][0]["settings"]["weight_decay"]
            elif line["kind"] == "results" and line["name"] == "robustness":
                self.rows = {row["attack"]: row for row in values["results"]}
                self.logits = values["weights"]["rescaled"]["largest_logit_change"]
            elif line["kind"] == "settings":
                self.kind = self.kind or (values.get("model", values).get("norm", ""), values.get("seed", 0))
        with np.load(folder / "robustness.npz") as file:
            self.right = {attack: file[f"{attack}/prediction"] == file["label"] for attack in self.rows}

    def values(self, key: str) -> np.ndarray:
        return np.array(list(self.curves.get(key, {}).values()))


def zero(run: Raw) -> Found | None:
    raw, without, control = (
        np.abs(run.values(key))
        for key in (
            "orthogonality/max_abs_cos",
            "orthogonality/max_abs_cos_corrected",
            "orthogonality_control/max_abs_cos",
        )
    )
    cosines = without if len(without) else raw
    good = np.median(control) >= 1e-2
    word = "supported" if good and cosines.max() <= 1e-3 else "undecided"
    if good and len(without) and np.median(cosines) > 1e-2:
        word = "refuted"
    return word, float(cosines.max())


def eq16(run: Raw) -> Found | None:
    if run.decay:
        return None
    measured, predicted = run.values("norm_growth/increment"), run.values("norm_growth/predicted")
    return law(run, float(np.abs(predicted - measured).sum() / np.abs(measured).sum()))


def law(run: Raw, error: float) -> Found:
    hidden = run.values("norm_growth/storage_floor").sum() / np.abs(run.values("norm_growth/increment")).sum()
    if error <= 0.01:
        return "supported", error
    return ("refuted" if hidden <= 0.01 and error > 0.1 else "undecided"), error


def explained(run: Raw) -> Found | None:
    missed = np.abs(run.values("norm_growth/residual")).sum() / np.abs(run.values("norm_growth/increment")).sum()
    return law(run, float(missed))[0], max(0.0, 1 - float(missed))


def growth(run: Raw) -> Found | None:
    if run.decay:
        return None
    norms, steps = run.values("norm_growth/weight_norm"), run.values("norm_growth/increment")
    shrinks = steps[steps < -run.values("norm_growth/storage_floor")]
    ratio = float(norms[-1] / norms[0])
    if not len(shrinks) and ratio > 1:
        return "supported", ratio
    return ("refuted" if -shrinks.sum() > 0.01 * steps[steps > 0].sum() and ratio <= 1 else "undecided"), ratio


def equilibrium(run: Raw) -> Found | None:
    wanted = run.curves.get("norm_growth/equilibrium_angle")
    if not wanted:
        return None
    steps = sorted(wanted)
    ratios = np.array([run.curves["norm_growth/angular_update"][step] / wanted[step] for step in steps])
    ratio = float(np.median(ratios[-max(1, len(steps) // 4) :]))
    assert np.ptp(list(wanted.values())) == 0, "the learning rate is constant"
    times = (steps[-1] - steps[0]) / run.values("norm_growth/steps_to_equilibrium")[-1]
    apart = max(ratio, 1 / ratio)
    if times < 3:
        return "undecided", ratio
    return ("supported" if apart <= 1.25 else "refuted" if apart > 1.25**2 else "undecided"), ratio


def windows(values: np.ndarray) -> tuple[float, float]:
    width = max(1, len(values) // 10)
    return float(values[:width].mean()), float(values[-width:].mean())


def gamma(run: Raw) -> Found | None:
    distances, ratios = (
        run.values(f"affine/{name}_median") for name in ("abs_gamma2_minus_sigma2", "gamma2_over_sigma2")
    )
    if not len(distances):
        return None
    norms = run.values("norm_growth/weight_norm")
    first, last = windows(distances)
    before, after = np.abs(np.log(windows(ratios)))
    word = "supported" if last / first <= 0.1 and after <= math.log(1.25) else "undecided"
    longer = max(1.0, norms[-1] / norms[0])
    return ("refuted" if last / first >= 1.1 * longer**2 and after >= before else word), last / first


def beta(run: Raw) -> Found | None:
    distances, norms = run.values("affine/abs_beta_minus_mu_median"), run.values("norm_growth/weight_norm")
    if not len(distances):
        return None
    first, last = windows(distances)
    word = "supported" if last / first <= 0.1 else "undecided"
    return ("refuted" if last / first >= 1.1 * max(1.0, norms[-1] / norms[0]) else word), last / first


def attacked(run: Raw) -> Found | None:
    names = [name for name in run.rows if not name.startswith(("clean", "gaussian")) and "rescaled" not in name]
    worst = min(names, key=lambda name: run.right[name].mean())
    drop = float(run.right["clean"].mean() - run.right[worst].mean())
    (_, clean_low, clean_high), (_, low, high) = (wilson(run.right[name]) for name in ("clean", worst))
    guessing = max(of for _, of in run.rows["clean"]["by_class"].values()) / len(run.right["clean"])
    if clean_low <= guessing:
        return "undecided", drop
    word = "supported" if high < clean_low and drop > 0.03 else "undecided"
    return ("refuted" if word == "undecided" and clean_high - low <= 0.03 else word), drop


def wilson(right: np.ndarray) -> tuple[float, float, float]:
    n, p, z = len(right), float(right.mean()), float(norm.ppf(0.975))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, middle - half, middle + half


def rescaled(run: Raw) -> Found | None:
    same, falls, changes = [], [], []
    for name in [one for one in run.rows if f"{one}_rescaled" in run.rows]:
        before, after = run.right[name], run.right[f"{name}_rescaled"]
        lost, won, n = int((before & ~after).sum()), int((~before & after).sum()), len(before)
        assert run.rows[f"{name}_rescaled"].get("changed", lost + won) == lost + won, (
            "records of earlier versions lack it"
        )
        p_lost, p_won = (lost + 1) / (n + 2), (won + 1) / (n + 2)
        middle = p_won - p_lost
        half = norm.ppf(0.975) * math.sqrt((p_lost + p_won - middle**2) / (n + 2))
        same.append(middle - half >= -0.03 and middle + half <= 0.03)
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        falls.append(p < 0.05 and (lost - won) / n > 0.03)
        changes.append(float(after.mean() - before.mean()))
    largest = max(changes, key=abs)
    if all(same):
        return "refuted", largest
    assert not any(falls) or run.logits > 0.01, "the function is the same"
    return "undecided", largest


SINGLE = {
    "orthogonality": zero,
    "equation_16": eq16,
    "increments": explained,
    "growth": growth,
    "equilibrium": equilibrium,
    "gamma_sigma": gamma,
    "beta_mu": beta,
    "vulnerability": attacked,
    "norm_cause": rescaled,
}
KINDS = {"decay_noise": ("gaussian",), "decay_attack": ("bim",)}


def voted(runs: list[Raw], beginnings: tuple[str, ...]) -> tuple[float, float, list[tuple[float, float]]]:
    """Return p, the mean difference, and p and difference of each pair."""
    pairs = [(one, other) for one in runs for other in runs if one.kind == other.kind and not one.decay and other.decay]
    names = [name for name in runs[0].rows if name.startswith(beginnings) and "rescaled" not in name]
    votes = [sum(b.right[name].astype(int) - a.right[name] for name in names) for a, b in pairs]
    means = [float(np.mean([b.right[name].mean() - a.right[name].mean() for name in names])) for a, b in pairs]

    def p_value(total: Any) -> float:
        won, lost = int((total > 0).sum()), int((total < 0).sum())
        return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0

    return p_value(sum(votes)), float(np.mean(means)), [(p_value(v), m) for v, m in zip(votes, means, strict=True)]


def adjusted(p_values: list[float]) -> list[float]:
    order = np.argsort(p_values)
    found = np.maximum.accumulate([(len(order) - k) * p_values[i] for k, i in enumerate(order)])
    return [float(min(1, found[list(order).index(i)])) for i in range(len(order))]


def recomputed(folders: list[Path]) -> dict[str, tuple[str, tuple[float, float]]]:
    """Return the word, and the smallest and the largest number, of each claim that runs in folders test."""
    runs = [Raw(folder) for folder in folders]
    found: dict[str, tuple[str, tuple[float, float]]] = {}
    for claim, judge in SINGLE.items():
        one = [each for each in map(judge, runs) if each is not None]
        words, numbers = [word for word, _ in one], [number for _, number in one]
        most = [word for word in ("supported", "refuted") if words.count(word) > len(words) / 2]
        contradict = {"supported", "refuted"} <= set(words)
        found[claim] = (most[0] if most and not contradict else "undecided"), (min(numbers), max(numbers))
    tests = {claim: voted(runs, beginnings) for claim, beginnings in KINDS.items()}
    for (claim, (_, mean, pairs)), p in zip(tests.items(), adjusted([p for p, _, _ in tests.values()]), strict=True):
        against = any(
            q < 0.05 and m * mean < 0 for q, (_, m) in zip(adjusted([q for q, _ in pairs]), pairs, strict=True)
        )
        agree = sum(m * mean > 0 for _, m in pairs) > len(pairs) / 2
        decided = p < 0.05 and agree and not against
        found[claim] = (("supported" if mean > 0 else "refuted") if decided else "undecided"), (mean, mean)
    return found


def check(folders: list[Path]) -> dict[str, str]:
    """Compare the verdicts of a study with those computed anew; return the words."""
    given = study_verdicts([read_record(folder) for folder in folders])
    expected = recomputed(folders)
    for claim, (word, (_, largest)) in expected.items():
        assert given[claim].word == word, (claim, given[claim], expected[claim])
        assert given[claim].value == pytest.approx(largest, rel=1e-9, abs=1e-15), claim
    untested = {claim for claim, one in given.items() if one.word == "not tested"}
    assert untested == given.keys() - expected.keys()
    return {claim: given[claim].word for claim in expected}


@pytest.fixture(scope="module")
def study(workplace: Path) -> list[Path]:
    """Train a small network with and without weight decay, for two seeds each, and attack it."""
    folders = []
    for seed in (0, 1):
        for decay in (0.0, 0.05):
            record = RecordLogger(str(workplace / "runs"), version=f"{seed}-{decay}")
            record.log_hyperparams({"seed": seed, "weight_decay": decay})
            monitors = OrthogonalityMonitor(), NormGrowthMonitor(), AffineConvergenceMonitor()
            evaluation = RobustnessEvaluation(eps=[0.05, 0.2], steps=2, rescale=10, num_images=0)
            run = trainer(*monitors, evaluation, steps=40, max_epochs=5, logger=record, log_every_n_steps=2)
            torch.manual_seed(seed)
            project = Project(sgd(weight_decay=decay))
            run.fit(project, images())
            run.test(project, images(96), verbose=False)
            folders.append(record.folder)
    return folders


@pytest.mark.filterwarnings("ignore::lightning_normgeo.errors.MeasurementWarning")
def test_verdicts_of_a_real_study_are_those_of_its_files(study: list[Path]) -> None:
    words = check(study)
    assert words["orthogonality"] == words["increments"] == "supported"
    assert len(set(words.values())) > 1
