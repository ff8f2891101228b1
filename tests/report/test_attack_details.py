"""Details of evaluations in a report: each number equals what is counted from the per-sample results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_normgeo import RecordLogger, RobustnessEvaluation
from lightning_normgeo.report.compared_runs import Run, load_runs
from lightning_normgeo.report.figures.robustness_figures import accuracies, against_eps
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.tables.table import Table
from lightning_normgeo.robustness.results.logged_results import detail_tables
from lightning_normgeo.runs.summary import summarize
from lightning_normgeo.runs.verdicts.claims.robustness_claims import ATTACK, strongest
from support.projects import Project, images, trainer

ATTACKS: list[Any] = [
    *("gaussian", "bim", "sanity"),
    {"name": "apgd", "steps": 3},
    {"name": "nearest", "attack": "bim", "eps": 0.3, "bisections": 5},
    {"name": "corruptions", "kinds": ["noise", "contrast"], "severities": [1, 5]},
]


class Several(Project):
    """A project with several test loaders."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Test nothing."""


DETAILS = ("sanity-", "nearest", "corruptions-")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("details")
    callback = RobustnessEvaluation(attacks=ATTACKS, eps=0.05, steps=3, num_images=2)
    log = RecordLogger(str(root), name="study", version="run")
    trainer(callback, logger=[log], default_root_dir=root).test(Project(), images(60), verbose=False)
    return root / "study" / "run"


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    (found,) = load_runs([folder])
    return found


@pytest.fixture(scope="module")
def tables(run: Run) -> dict[str, Table]:
    return {table.anchor: table for table in all_tables([run])}


@pytest.fixture(scope="module")
def correct(folder: Path) -> dict[str, Any]:
    arrays = np.load(folder / "robustness.npz")
    return {key.removesuffix("/correct"): arrays[key] for key in arrays if key.endswith("/correct")}


def rows(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_overviews_leave_details_out(run: Run, tables: dict[str, Table], correct: dict[str, Any]) -> None:
    names = [row["attack"] for row in run.results]
    assert names == ["clean", "gaussian", "bim", "apgd", "worst"]
    assert {row["attack"] for row in run.all_results} == set(correct)
    assert all(name.startswith(DETAILS) for name in set(correct) - set(names))
    assert "robustness" in tables
    assert strongest(run.record)[ATTACK]["attack"] in names
    shown = str(summarize(run.record.folder))
    assert "sanity" not in shown
    assert "corruptions, mean" in shown


def test_what_each_attack_adds_is_counted_from_the_samples(tables: dict[str, Table], correct: dict[str, Any]) -> None:
    listed = ["bim", "sanity-iterative", "sanity-single-step", "sanity-random", "apgd"]
    left = correct["clean"].copy()
    expected = []
    for name in listed:
        others = np.all([correct[one] for one in listed if one != name], axis=0)
        taken = left & ~correct[name]
        expected.append([name, *(str(int(x.sum())) for x in (~correct[name], taken, ~correct[name] & others))])
        left &= correct[name]
    assert [row[2:] for row in rows(tables["worst-case"])] == expected
    assert int(correct["worst"].sum()) == int((left & correct["worst"]).sum())


def test_agreement_counts_samples_that_are_right_on_clean_images(
    tables: dict[str, Table], correct: dict[str, Any]
) -> None:
    (row,) = rows(tables["agreement"])
    bim, apgd = (~correct[name][correct["clean"]] for name in ("bim", "apgd"))
    counts = [bim & apgd, bim & ~apgd, ~bim & apgd, ~bim & ~apgd]
    assert row[1:] == ["bim", "apgd", *(str(int(x.sum())) for x in counts)]


def test_medians_are_those_of_the_perturbations(folder: Path, tables: dict[str, Table]) -> None:
    arrays = np.load(folder / "robustness.npz")
    radii = np.where(arrays["nearest/correct"], np.inf, arrays["nearest/linf"].astype(float))
    (row,) = tables["smallest-radii"].rows
    assert row[1].text == "nearest, smallest radii" or row[1].text == "nearest"
    assert row[3].value == pytest.approx(float(np.median(radii)))
    assert row[4].text == str(int(np.isfinite(radii).sum()))


def test_corruptions_are_means_over_severities(tables: dict[str, Table], correct: dict[str, Any]) -> None:
    (row,) = tables["corruptions"].rows
    assert tables["corruptions"].columns == ["network", "mean", "noise", "contrast"]
    means = {kind: np.mean([correct[f"corruptions-{kind}_s{k}"] for k in (1, 5)]) for kind in ("noise", "contrast")}
    assert [cell.value for cell in row[2:]] == pytest.approx([means["noise"], means["contrast"]])
    assert row[1].value == pytest.approx(np.mean(list(means.values())))


def test_classes_are_counted_clean_and_in_the_worst_case(
    folder: Path, tables: dict[str, Table], correct: dict[str, Any]
) -> None:
    labels = np.load(folder / "robustness.npz")["label"]
    table = tables["by-class"]
    assert [row[1].text for row in table.rows] == ["clean", "worst"]
    for row, name in zip(table.rows, ("clean", "worst"), strict=True):
        for label, cell in zip(table.columns[2:], row[2:], strict=True):
            assert cell.value == pytest.approx(correct[name][labels == int(label)].mean())


def test_checks_are_those_of_the_record(run: Run, tables: dict[str, Table]) -> None:
    recorded = run.record.results["robustness"]["sanity"]
    assert [row[1:] for row in rows(tables["sanity"])] == [list(check.values()) for check in recorded]
    assert len(recorded) == 5


def test_figures_show_the_curve_of_smallest_radii_and_no_details(run: Run) -> None:
    figure, curve = accuracies([run]), against_eps([run])
    assert figure is not None
    assert curve is not None
    assert not any(name in str(figure.spec) for name in DETAILS)
    shown = str(curve.spec)
    assert "nearest, smallest radii" in shown
    assert "sanity" not in shown


def test_loggers_get_a_table_of_each_kind_of_detail(run: Run, tables: dict[str, Table]) -> None:
    found = detail_tables(run.record.results["robustness"])
    assert list(found) == ["worst", "radii", "corruptions", "sanity"]
    assert all(len(row) == len(columns) for columns, rows in found.values() for row in rows)
    assert [[str(cell) for cell in row] for row in found["worst"][1]] == [row[1:] for row in rows(tables["worst-case"])]
    assert detail_tables({"results": []}) == {}


def test_details_are_logged_as_accuracies_alone(run: Run) -> None:
    keys = {key for key in run.record.metrics if key.startswith("robustness/")}
    assert {"robustness/bim/n", "robustness/worst/ci_low", "robustness/corruptions/ci_high"} <= keys
    details = {key for key in keys if key.startswith(tuple(f"robustness/{name}" for name in DETAILS))}
    assert details
    assert all(key.endswith("/accuracy") for key in details)


def test_loaders_have_details_of_their_own(tmp_path: Path) -> None:
    loaders = {"a": images(20), "b": images(30)}
    callback = RobustnessEvaluation(attacks=["bim", {"name": "apgd", "steps": 2}], eps=0.05, steps=2)
    log = RecordLogger(str(tmp_path), name="study", version="run")
    trainer(callback, logger=[log], default_root_dir=tmp_path).test(Several(), list(loaders.values()), verbose=False)
    (found,) = load_runs([tmp_path / "study" / "run"])
    (table,) = (one for one in all_tables([found]) if one.anchor == "worst-case")
    assert len({row[0].text for row in table.rows}) == 2
    assert math.isfinite(sum(float(cell.value) for row in table.rows for cell in row[3:]))


def test_random_models_and_plain_runs_have_no_such_tables(tmp_path: Path) -> None:
    callback = RobustnessEvaluation(attacks=["bim"], steps=2, num_images=0)
    log = RecordLogger(str(tmp_path), name="study", version="run")
    torch.manual_seed(0)
    trainer(callback, logger=[log], default_root_dir=tmp_path).test(Project(), images(20), verbose=False)
    anchors = [table.anchor for table in all_tables(load_runs([tmp_path / "study" / "run"]))]
    assert not set(anchors) & {"worst-case", "agreement", "smallest-radii", "corruptions", "sanity"}


def test_verified_decisions_are_counted_from_the_samples(tmp_path: Path) -> None:
    callback = RobustnessEvaluation(attacks=["gaussian", "bim"], eps=0.05, steps=3, autocast="bf16-verified")
    log = RecordLogger(str(tmp_path), name="study", version="run")
    trainer(callback, logger=[log], default_root_dir=tmp_path).test(Project(), images(60), verbose=False)
    runs = load_runs([log.folder])
    with np.load(log.folder / "robustness.npz") as arrays:
        checked = np.bincount(arrays["bim/checked"], minlength=5)
    expected = [60, checked[1] + checked[2], checked[2], checked[3] + checked[4], checked[4]]
    table = {table.anchor: table for table in all_tables(runs)}["verified"]
    assert checked[1:].sum() > 0
    assert [row[1:] for row in rows(table)] == [["bim", *map(str, expected)]]
    assert runs[0].evaluation_settings("")["precision"] == "bf16-verified"
