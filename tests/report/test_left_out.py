"""What a report lacks is said in it: runs of a study without a record, steps and trainings without a measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo import RecordLogger
from lightning_normgeo.report import write_report
from lightning_normgeo.report.compared_runs import load_runs
from lightning_normgeo.report.sources import AbsentRun, absent_runs

FAILED = AbsentRun("gn", "failed", "RuntimeError: the disk is <full>")
RUNS = [
    {"name": "bn", "status": "finished", "error": ""},
    FAILED._asdict(),
    {"name": "wn", "status": "waiting"},
]


def run(folder: str, summary: str = "", **left_out: int) -> Path:
    """Write a record of two steps, with the line with which its training ended."""
    path = Path(folder)
    logger = RecordLogger(str(path.parent.parent), path.parent.name, path.name)
    for step in (1, 2):
        logger.log_metrics({"train_loss": 1.0 / step}, step=step)
    logger.log_observation({"summary": summary, "left_out": left_out})
    logger.finalize("success")
    return path


@pytest.fixture
def study() -> Path:
    run("runs/study/bn")
    index = Path("runs/study/study.json")
    index.write_text(json.dumps({"runs": RUNS}))
    return index


def absent(source: Any) -> list[AbsentRun]:
    return absent_runs(source, [one.record.folder for one in load_runs([source])])


def test_runs_of_a_study_without_a_record_are_named(study: Path) -> None:
    expected = [FAILED, AbsentRun("wn", "waiting", "")]
    assert absent(study) == absent("runs/study") == absent("runs") == expected
    assert absent("runs/study/bn") == [], "one run was asked for"


def test_an_index_that_cannot_be_read_names_none(study: Path) -> None:
    study.write_text("{")
    with pytest.warns(UserWarning, match="is not the index of a study"):
        assert absent("runs") == []


@pytest.mark.parametrize("form", ["html", "md"])
def test_every_report_of_a_study_has_them(study: Path, form: str) -> None:
    page = write_report("runs/study", form=form).read_text(encoding="utf-8")
    assert "Runs that are not in this report" in page
    assert "RuntimeError: the disk is" in page
    if form == "html":
        assert '<strong>Not in this report:</strong> <a href="#absent">2 of 3 runs</a>.' in page
    study.write_text(json.dumps({"runs": RUNS[:1]}))
    assert "not in this report" not in write_report("runs/study", form=form).read_text(encoding="utf-8").lower()


def test_steps_and_trainings_without_a_measurement_are_named() -> None:
    lines = ["measured 2 of 9 optimizer steps, 1 row logged; left out 1 x: no.", "measured 0 of 9 optimizer steps."]
    runs = [run("runs/a/0", f"normgeo {lines[0]}", no=1), run("runs/a/1", f"normgeo {lines[1]}")]
    full = run("runs/a/2", "normgeo measured 9 of 9 optimizer steps, 9 rows logged.")
    text = write_report([*runs, full], "report.md", "md").read_text(encoding="utf-8")
    section = text[text.index("Steps without a measurement") :]
    assert [line in section for line in lines] == [True, True]
    assert "9 rows logged" not in section
    assert "without a measurement" not in write_report(full, form="md").read_text(encoding="utf-8")


def test_a_page_with_curves_and_no_verdict_says_that_nothing_was_measured() -> None:
    page = write_report(run("runs/a/0")).read_text(encoding="utf-8")
    assert 'id="loss"' in page
    assert "<p>Nothing was measured. Add the callbacks" in page
