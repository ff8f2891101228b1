"""The page with the robustness table has the numbers of its record, and its text agrees with them."""

from __future__ import annotations

import json

import pytest

from lightning_normgeo.robustness import wilson_interval
from support.scripts import load_script

script = load_script("docs/robustness_table.py")
RECORD = json.loads(script.RECORD.read_text(encoding="utf-8"))
PAGE = script.PAGE.read_text(encoding="utf-8")
RADII = ("eps0.003922", "eps0.007843")


def test_the_tables_are_those_of_the_record() -> None:
    assert script.with_tables(PAGE) == PAGE
    assert len(script.accuracy_table(RECORD).splitlines()) == 2 + len(RECORD["runs"]) == 10
    assert len(script.paired_table(RECORD).splitlines()) == 2 + 4


@pytest.mark.parametrize("name", RECORD["runs"])
def test_the_worst_case_is_no_better_than_any_attack_and_falls_with_the_radius(name: str) -> None:
    rows = RECORD["runs"][name]["rows"]
    for radius in RADII:
        attacks = [rows[f"{kind}_{radius}"]["correct"] for kind in ("bim", "apgd", "apgd-t", "square")]
        assert rows[f"worst_{radius}"]["correct"] <= min(attacks)
    assert rows[f"worst_{RADII[1]}"]["correct"] <= rows[f"worst_{RADII[0]}"]["correct"] <= rows["clean"]["correct"]
    for row in rows.values():
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(wilson_interval(row["correct"], row["n"]))


def test_no_sanity_check_failed() -> None:
    assert all("failed" not in run["sanity"] for run in RECORD["runs"].values())


def test_differences_are_those_of_the_accuracies() -> None:
    for norm, rows in RECORD["paired"].items():
        free, decayed = (RECORD["runs"][f"{norm}-{kind}"]["rows"] for kind in ("free", "decay"))
        for row, one in rows.items():
            assert one["difference"] == pytest.approx(decayed[row]["accuracy"] - free[row]["accuracy"])
            assert one["p_value"] <= one["p_holm"] <= 1


def test_the_text_agrees_with_the_numbers() -> None:
    assert all(one["p_holm"] > 0.05 for rows in RECORD["paired"].values() for one in rows.values())
    growth = {name: run["norms"][1] / run["norms"][0] - 1 for name, run in RECORD["runs"].items()}
    free = [growth[f"{norm}-free"] for norm in script.NORMS]
    assert (round(100 * min(free)), round(100 * max(free))) == (12, 24)
    assert all(growth[f"{norm}-decay"] < growth[f"{norm}-free"] for norm in script.NORMS)
    rows = {norm: RECORD["runs"][f"{norm}-free"]["rows"] for norm in script.NORMS}
    accuracy = {row: {norm: rows[norm][row]["accuracy"] for norm in rows} for row in ("clean", f"worst_{RADII[1]}")}
    assert max(accuracy["clean"], key=accuracy["clean"].__getitem__) == "bn"
    assert min(accuracy[f"worst_{RADII[1]}"], key=accuracy[f"worst_{RADII[1]}"].__getitem__) == "bn"
    for run in RECORD["runs"].values():
        (gained,) = (one["gained"] for one in run["worst"] if one["name"] == f"worst_{RADII[0]}")
        assert gained[f"apgd_{RADII[0]}"] <= 2
        assert 2 <= gained[f"apgd-t_{RADII[0]}"] <= 7
        assert gained[f"square_{RADII[0]}"] == 0
