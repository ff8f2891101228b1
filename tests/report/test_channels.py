"""The figure and the tables of channel evaluations, made from the records of real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_normgeo import ChannelEvaluation, RecordLogger, read_record
from lightning_normgeo.report import write_report
from lightning_normgeo.report.compared_runs import Run, compare_runs, load_runs
from lightning_normgeo.report.figures.channel_figures import channels
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.runs.records.record import Record
from support.projects import Project, images, trainer
from support.small_models import worn

SETTINGS: dict[str, Any] = {
    "criteria": ["gamma", "pairs", "random"],
    "replace": ["zero", "partner"],
    "ratios": [0.2, 0.4],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    project, place = Project(), tmp_path_factory.mktemp("channels")
    worn(project)
    trainer(ChannelEvaluation(**SETTINGS), logger=RecordLogger(str(place), version="one")).test(
        project, images(24), verbose=False
    )
    return place / "normgeo" / "one"


def table(runs: list[Run], anchor: str) -> Any:
    return next((found for found in all_tables(runs) if found.anchor == anchor), None)


def test_figure_and_tables_have_the_recorded_numbers(folder: Path) -> None:
    runs, document = load_runs([folder]), read_record(folder).results["channels"]
    figure = channels(runs)
    rows = figure.spec["data"]["values"]
    assert len(rows) == len(document["results"]) + 4, "each curve begins with the whole network"
    drawn = {(row["removed"], row["accuracy"], row["ci_low"], row["ci_high"]) for row in rows}
    names = ("removed_share", "accuracy", "ci_low", "ci_high")
    assert {tuple(row[name] for name in names) for row in document["results"]} <= drawn
    assert (0.0, *(document["clean"][name] for name in names[1:])) in drawn
    assert {row["kind"] for row in rows} == {"ranked", "at random"}
    accuracies = table(runs, "channels")
    assert [row[3].value for row in accuracies.rows[1:]] == [
        row["accuracy"] for row in document["results"] if row["ratio"] == 0.2
    ]
    assert accuracies.rows[0][3].value == document["clean"]["accuracy"]
    pairs = table(runs, "channel-pairs")
    assert [cell.value for cell in pairs.rows[0][1:]] == list(document["pairs"].values())


def test_every_format_has_them(folder: Path, tmp_path: Path) -> None:
    for form, sign in (("html", "What removing channels costs"), ("md", "superfluous channels"), ("tex", "channels")):
        assert sign in write_report(folder, tmp_path / f"report.{form}", form).read_text(encoding="utf-8")


def run_with(document: Any) -> list[Run]:
    return compare_runs([Record(Path("run"), results={"channels": document})])


def test_what_was_not_evaluated_is_said() -> None:
    runs = run_with({"not_evaluated": "no batch normalization", "left_out": {}, "results": [], "clean": None})
    assert channels(runs) is None
    assert [cell.text for cell in table(runs, "robustness-not-evaluated").rows[0][1:]] == [
        "channels",
        "no batch normalization",
    ]
    runs = run_with({"left_out": {"share": "Hardtanh"}})
    assert [cell.text for cell in table(runs, "robustness-not-evaluated").rows[0][1:]] == [
        "channels by share of its readers' input",
        "Hardtanh",
    ]


@pytest.mark.parametrize(
    "document",
    [None, [], "x", {}, {"results": 3}, {"results": [3, {}, {"accuracy": None}], "clean": {}, "pairs": {"pairs": "x"}}],
)
def test_damaged_results_are_left_out(document: Any) -> None:
    runs = run_with(document)
    assert channels(runs) is None
    assert table(runs, "channels") is None


def test_a_share_that_differs_from_the_ratio_is_shown() -> None:
    result = {"criterion": "gamma", "replace": "zero", "ratio": 0.1, "removed_share": 1.0, "accuracy": 0.1}
    document = {"results": [{**result, "ci_low": 0.05, "ci_high": 0.2, "n": 50}]}
    assert table(run_with(document), "channels").rows[0][3].text == "10.00 % [5.00, 20.00] (100 % removed)"
