"""The page on the symmetries of known architectures is that of its script."""

from __future__ import annotations

import pytest

from support.scripts import load_script

script = load_script("benchmarks/scale_symmetries.py")
ROWS = {
    line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
    for line in script.PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "architecture" not in line
}
FAST = ("torchvision resnet18", "resnet18 with gn", "resnet18 with sn", "U-Net with attention")


@pytest.mark.parametrize("name", FAST)
def test_rows_are_those_of_the_script_and_charges_are_rounding(name: str) -> None:
    nodes, generators, shares, _, charge, unknown = script.row(dict(script.architectures())[name])
    assert [nodes, generators, shares, unknown] == [*ROWS[name][:3], ROWS[name][5]]
    assert float(charge) < 1e-12


def test_no_architecture_failed_or_is_missing() -> None:
    assert not [name for name, cells in ROWS.items() if cells[0] == "failed"]
    assert set(ROWS) >= set(dict(script.architectures()))
    assert len(ROWS) > 45


@pytest.mark.parametrize("name", ["resnet18 with gn"])
def test_the_printed_families_are_those_of_the_network(name: str) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert f"## {name}\n\n```text\n{script.families(name)}\n```" in text
