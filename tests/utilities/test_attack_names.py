"""Names of attacks: controls, and titles with a radius in steps of pixels where it is a whole number of them."""

from __future__ import annotations

import pytest

from lightning_normgeo.utilities.attack_names import (
    RESCALED,
    attack_title,
    control_of,
    is_control,
    strength,
    without_control,
)
from support.isolation import REPOSITORY


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


@pytest.mark.parametrize("attack", ["clean", "bim_eps0.03", "bim/second"])
def test_a_control_has_the_name_of_its_attack(attack: str) -> None:
    control = control_of(attack)
    assert (is_control(control), is_control(attack)) == (True, False)
    assert without_control(control) == without_control(attack) == attack


def test_the_ending_of_controls_is_written_in_one_place() -> None:
    files = [
        file.name
        for file in (REPOSITORY / "lightning_normgeo").rglob("*.py")
        if f'"{RESCALED}' in file.read_text(encoding="utf-8")
    ]
    assert files == ["attack_names.py"]
