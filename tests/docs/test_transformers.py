"""The page on transformers says what its record shows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.pages import DOCS

RUNS: dict[str, Any] = json.loads((DOCS / "records" / "transformers.json").read_text(encoding="utf-8"))
PAGE = " ".join((DOCS / "reference" / "transformers.md").read_text(encoding="utf-8").split())
PAIRS = ("queries against keys", "values")
AFFINE = "γ, β against their readers"


def test_both_networks_were_trained_with_both_optimizers() -> None:
    assert set(RUNS) == {"gpt-adamw", "gpt-muon", "vit-adamw", "vit-muon"}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_charges_vanish_and_their_terms_do_not(name: str) -> None:
    curves = RUNS[name]["curves"]
    assert "Charges are zero, and the terms they are made of are not" in PAGE
    assert curves["symmetry/max_charge"]["most"] < 1e-4
    assert curves["symmetry/max_uncanceled"]["most"] > 0.3
    assert curves["orthogonality_control/max_abs_cos"]["most"] > 0.5


@pytest.mark.parametrize("name", sorted(RUNS))
def test_nearly_all_parameters_take_part(name: str) -> None:
    shares = RUNS[name]["shares"]
    assert shares["invariant alone"] == 0
    assert shares["none"] < 0.01
    assert f"{100 * shares['invariant jointly']:.1f} %" in PAGE


@pytest.mark.parametrize("network", ["gpt", "vit"])
def test_muon_drives_only_rescalings_with_vectors_out_of_balance(network: str) -> None:
    assert "Muon drives rescalings out of balance" in PAGE
    muon, adamw = (RUNS[f"{network}-{optimizer}"]["imbalance"] for optimizer in ("muon", "adamw"))
    first, last = muon[AFFINE]
    assert last > 0.4 > 3 * first
    assert adamw[AFFINE][1] < 0.5 * last
    assert max(muon[pair][1] for pair in PAIRS) < 0.5 * last
