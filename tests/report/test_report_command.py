"""``normgeo report``: output paths, formats, and refused arguments."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lightning_normgeo import __main__ as shell
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.report import write_report
from lightning_normgeo.report.compared_runs import load_runs
from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.report.figures.geometry_figures import all_figures
from lightning_normgeo.report.report_command import main, write_quietly
from lightning_normgeo.report.write import FORMATS
from support.records import write_run, write_study


def printed(capsys: pytest.CaptureFixture[str]) -> Path:
    return Path(capsys.readouterr().out.strip())


def test_a_study_gets_its_report_in_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study("runs/small", norms=("bn", "gn"))
    assert main([str(study)]) == 0
    path = printed(capsys)
    assert path == (study / "report.html").absolute()
    page = path.read_text(encoding="utf-8")
    assert "<h1>small</h1>" in page
    assert "4 runs of 60 training steps" in page
    for name in ("bn, no weight decay", "bn, weight decay 0.0005", "gn, no weight decay", "gn, weight decay 0.0005"):
        assert name in page


def test_runs_of_several_places_are_reported_here(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write_run("runs/a/one", norm="bn"), write_run("runs/b/other", norm="gn")
    assert main([str(one), str(other), "--title", "Two runs"]) == 0
    assert printed(capsys) == Path("report.html").absolute()
    assert "<h1>Two runs</h1>" in Path("report.html").read_text(encoding="utf-8")


def test_thresholds_are_options_or_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    study = str(write_study("runs/small", norms=("bn",)))
    Path("limits.yaml").write_text("min_steps: 30\n", encoding="utf-8")
    for options in (["--thresholds.min_steps", "30"], ["--thresholds", "limits.yaml"]):
        assert main([study, "--format", "md", *options]) == 0
        assert "12 of 30 needed steps" in printed(capsys).read_text(encoding="utf-8")
    assert main([study, "--format", "md"]) == 0
    assert "needed steps" not in printed(capsys).read_text(encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"thresholds\.far=1.* must be a number above 1\. Default: 10"):
        main([study, "--thresholds.far", "1"])


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_written(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study("runs/small", norms=("bn",))
    assert main([str(study), "--format", form]) == 0
    path = printed(capsys)
    if form in ("png", "pdf"):
        anchors = {figure.anchor for figure in all_figures(Curves(load_runs([study])))}
        assert {file.name for file in path.iterdir()} == {f"{anchor}.{form}" for anchor in anchors}
        assert path == (study / "figures").absolute()
        assert all(file.stat().st_size > 2000 for file in path.iterdir())
    else:
        assert path == (study / f"report.{form}").absolute()
        assert "weight decay 0.0005" in path.read_text(encoding="utf-8").replace("\\_", "_") or form == "csv"


def test_pictures_are_pictures_and_pdfs_are_pdfs() -> None:
    run = write_run("runs/a/one")
    with Image.open(write_report(run, "out", "png") / "norms.png") as picture:
        assert min(picture.size) > 300
    assert (write_report(run, "out", "pdf") / "norms.pdf").read_bytes().startswith(b"%PDF")


def test_csv_has_a_row_for_each_run_and_attack() -> None:
    path = write_report(write_study("runs/small", norms=("bn",), seeds=(0, 1)), "deep/er/table.csv", "csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    attacks = [row["attack"] for row in load_runs(["runs/small"])[0].results]
    assert len(rows) == 4 * len(attacks)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["runs/one", "--format", "docx"], "--format docx is unknown; choose one of 'html', 'md', 'tex', 'csv'"),
        (["nowhere"], r"nowhere/record\.jsonl|nowhere does not exist"),
        (["runs/one", "--output", "runs/one/record.jsonl/report.html"], "cannot write there"),
        (["runs/one", "--wandb", "project"], "--wandb project is not entity/project"),
    ],
)
def test_what_cannot_work_is_one_clear_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run("runs/one")
    with pytest.raises(ConfigurationError, match=message):
        main(args)
    with pytest.raises(SystemExit) as stopped:
        shell.main(["report", *args])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("normgeo: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], r"normgeo report needs runs\. See normgeo report --help\."),
        (["runs/one", "--frmt", "md"], r"--frmt is no option of normgeo report\. Nearest: '--format'"),
        (["runs/one", "--thresholds.min_steps", "x"], r"--thresholds\.min_steps x cannot be used\. .* an integer\."),
    ],
)
def test_wrong_usage_is_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"normgeo: error: {message}.*", line), line


def test_runs_of_different_models_are_compared_where_they_can_be() -> None:
    small = write_run("runs/s/small", settings={"model": {"arch": "resnet18", "norm": "bn"}})
    large = write_run("runs/s/large", settings={"model": {"arch": "resnet101", "norm": "bn"}})
    page = write_report([small, large]).read_text(encoding="utf-8")
    assert "arch resnet18" in page
    assert "arch resnet101" in page


def test_a_run_without_robustness_beside_one_with() -> None:
    runs = [write_run("runs/s/with"), write_run("runs/s/without", norm="gn", robustness=False)]
    for form in ("html", "md", "tex", "csv"):
        assert write_report(runs, form=form).stat().st_size > 200
    only = write_report(runs[1]).read_text(encoding="utf-8")
    assert 'id="chart-norms"' in only
    assert 'id="chart-accuracies"' not in only


def test_a_torn_record_is_reported_as_far_as_it_goes() -> None:
    run = write_run("runs/s/one")
    record = run / "record.jsonl"
    lines = record.read_text(encoding="utf-8").splitlines()
    record.write_text("\n".join(lines[: len(lines) // 2]) + "\n" + lines[len(lines) // 2][:30], encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert "Not ended, or killed:" in page
    assert 'id="chart-norms"' in page


def test_layers_can_be_chosen() -> None:
    run = write_run("runs/s/one")
    page = write_report(run, layers=["*layer2*"]).read_text(encoding="utf-8")
    options = page.split("<option>")[1:]
    assert [option.partition("<")[0] for option in options][:2] == ["all layers", "model.layer2.0.conv1"]
    assert all("layer2" in option.partition("<")[0] for option in options[1:])


def test_layers_that_no_run_has_are_named() -> None:
    run = write_run("runs/s/one")
    with pytest.warns(MeasurementWarning, match=r"layers=\['layer7'\] matches no layer .* Nearest: 'model\."):
        write_report(run, layers=["*layer2*", "layer7"])


def test_a_report_that_fails_does_not_end_a_study() -> None:
    assert write_quietly(["nowhere"]).startswith("not written: ")
    assert Path(write_quietly([write_run("runs/s/one")])).name == "report.html"


def test_without_the_extra_it_says_what_to_install() -> None:
    run = write_run("runs/s/one")
    code = "import sys; sys.modules['altair'] = None; from lightning_normgeo.__main__ import main; main()"
    command = [sys.executable, "-c", code, "report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "normgeo report needs altair: pip install 'lightning-normgeo[report]'" in done.stderr
