"""Titles of attacks write a radius in steps of pixels where it is a whole number of them."""

from __future__ import annotations

import pytest

from lightning_normgeo.runs.findings.attack_names import attack_title, strength


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("bim", "bim"),
        ("clean", "clean"),
        ("bim_eps0.00784", "bim, ε = 2/255"),
        ("bim_eps0.03137/second", "bim/second, ε = 8/255"),
        ("bim_eps0.03", "bim, ε = 0.03"),
        ("pgd_l2_eps0.50196", "pgd_l2, ε = 0.502"),
        ("bim_eps1e-05", "bim, ε = 1e-05"),
        ("bim_eps0.03137_rescaled", "bim_rescaled, ε = 8/255"),
    ],
)
def test_titles(name: str, title: str) -> None:
    assert attack_title(name) == title


@pytest.mark.parametrize("steps", range(1, 65))
def test_every_radius_in_pixels_is_written_so(steps: int) -> None:
    title = "0.2" if steps == 51 else f"{steps}/255"
    assert strength(steps / 255) == strength(float(f"{steps / 255:.5f}")) == title
    assert attack_title(f"bim_eps{steps / 255:.5g}") == f"bim, ε = {title}"
    assert "/255" not in strength((steps + 0.1) / 255)
