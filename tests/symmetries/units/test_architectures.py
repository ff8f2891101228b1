"""The units of known architectures are those in docs/theory/units.md, and exact up to rounding in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.isolation import REPOSITORY
from support.scripts import load_script

table = load_script("docs/units.py")
DOCUMENTED = {
    tuple(cell.strip() for cell in line.split("|")[1:3]): line
    for line in (REPOSITORY / "docs" / "theory" / "units.md").read_text().splitlines()
    if line.startswith("| ")
}


def test_every_case_is_documented() -> None:
    assert set(DOCUMENTED) == {
        ("model", "normalization"),
        *((name, norm or "as built") for name, norm in table.cases()),
    }


LARGEST = "vgg16_bn"
LARGE = ("resnet101", LARGEST, "densenet121", "convnext_tiny", "googlenet", "efficientnet_b0")


def cases() -> Iterator[Any]:
    """Yield all networks of the table; the largest, and large ones with other normalizations, are marked slow."""
    for name, norm in table.cases():
        is_slow = name == LARGEST or (name in LARGE and norm)
        yield pytest.param(name, norm, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize(("name", "norm"), list(cases()))
def test_units_are_as_documented_and_exact(name: str, norm: str) -> None:
    row = table.measure(name, norm)
    assert row.unit_cosine < 1e-12
    assert row.control_cosine is None or row.control_cosine > 1e-3
    line = DOCUMENTED[name, norm or "as built"]
    assert [cell.strip() for cell in line.split("|")[3:8]] == [cell.strip() for cell in str(row).split("|")[3:8]]
