"""The gallery has no number besides those of its record, and its claims hold for these."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest

from support.pages import DOCS

GALLERY = runpy.run_path(str(DOCS / "gallery.py"))
DATA = GALLERY["recorded"]()
NORMS = GALLERY["norms"](DATA)
TEMPLATE = (DOCS / "records" / "gallery.txt").read_text(encoding="utf-8")
PAGE = " ".join(GALLERY["PAGE"].read_text(encoding="utf-8").split())
NAMES = (
    r"CIFAR-10|ResNet-\d+|32×32|seed 0|first 100|[Ee]q 16|Fig \d|Table 1|Lemma 2|1/\(4ηλ\)|95 %|nearer to 1|paper_\w+"
    r"|--jobs 2"
)
"""Numbers in names, formulas and the description of the data."""


def runs(decay: bool) -> list[dict[str, Any]]:
    return [GALLERY["run"](DATA, norm, decay) for norm in NORMS]


def curve(run: dict[str, Any], key: str) -> dict[str, float]:
    return run["curves"][key]


def test_the_text_has_no_number_of_its_own() -> None:
    text = re.sub(r"\{\w+\}|\(\.\./\S+\)", "", " ".join(TEMPLATE.split()))
    assert re.findall(r"\S*\d\S*", re.sub(NAMES, "", text)) == []


def test_weights_are_orthogonal_to_their_gradients() -> None:
    assert "Supported, up to rounding" in PAGE
    for run in runs(False) + runs(True):
        assert curve(run, "orthogonality/max_abs_cos")["most"] < 1e-4
        assert curve(run, "orthogonality_control/max_abs_cos")["most"] > 0.1
    removed = [run["curves"].get("orthogonality/max_abs_cos_corrected") for run in runs(False)]
    assert removed[0]["most"] < 0.6 * curve(runs(False)[0], "orthogonality/max_abs_cos")["most"]
    assert removed[1:] == [None] * (len(NORMS) - 1)


def test_equation_16_holds_where_it_applies() -> None:
    assert "Supported where it applies" in PAGE
    for run in runs(False):
        assert run["sums"]["predicted"] == pytest.approx(run["sums"]["increment"], rel=0.01)
    for run in runs(True):
        sums = run["sums"]
        assert sums["explained"] == pytest.approx(sums["increment"], rel=1e-3)
        assert -sums["term_weight_decay"] > 5 * sums["predicted"] > 0


def test_norms_grow_without_and_shrink_with_weight_decay() -> None:
    norms = ((curve(run, "norm_growth/weight_norm") for run in runs(decay)) for decay in (False, True))
    growth = [[GALLERY["growth"](one) for one in some] for some in norms]
    assert min(growth[0]) > 0 > max(growth[1])
    settings = DATA["settings"]
    assert settings["steps"] < 0.5 / (4 * settings["lr"] * settings["decay"])
    assert max(map(GALLERY["turn"], runs(True))) < 0.8


def test_gamma_approaches_sigma_and_beta_not_mu() -> None:
    assert "Seen for γ, not for β" in PAGE
    for run in (runs(False)[0], runs(True)[0]):
        ratio, gamma, beta = (
            curve(run, f"affine/{name}_median")
            for name in ("gamma2_over_sigma2", "abs_gamma2_minus_sigma2", "abs_beta_minus_mu")
        )
        assert ratio["first"] > ratio["last"] > 1
        assert gamma["first"] > gamma["last"] > 0.2
        assert beta["last"] > max(beta["first"], 0.2)


def test_weight_decay_gains_no_robustness() -> None:
    assert "makes networks more robust. Not seen here" in PAGE
    assert len(DATA["paired"]) == len(NORMS) * (2 + len(DATA["settings"]["eps"]))
    assert [one for one in DATA["paired"] if one["p_holm"] < 0.05 and one["won"] > one["lost"]] == []


def test_longer_weights_change_nothing() -> None:
    for run in runs(False) + runs(True):
        decisions = sum(run["accuracies"][name][1] for name in run["changed"])
        assert sum(run["changed"].values()) < 0.003 * decisions
