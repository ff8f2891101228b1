"""Sources of a report: finding runs in folders, and the errors if there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo import RecordLogger
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.report import sources, write_report
from lightning_normgeo.report.compared_runs import load_runs
from lightning_normgeo.runs.records.record_reader import read_record


def run(folder: str) -> Path:
    """Write a small record."""
    path = Path(folder)
    logger = RecordLogger(str(path.parent.parent), path.parent.name, path.name)
    logger.log_metrics({"norm_growth/weight_norm": 1.0}, step=1)
    logger.finalize("success")
    return path


def folders(*given: Any) -> list[str]:
    return [str(found.record.folder) for found in load_runs(given)]


@pytest.fixture
def tree(tmp_path: Path) -> list[str]:
    """Write runs at several depths, beside folders without runs; return them in the form that a report finds."""
    for hidden in ("runs/.trash/x/y", "runs/normgeo/b/checkpoints/x", "runs/wandb/run-1/x", "runs/a/b/c/d/too/deep"):
        run(hidden)
    found = [run(path) for path in ("runs/normgeo/a", "runs/normgeo/b10", "runs/normgeo/b9", "runs/z/y/x/w")]
    run("runs/study/two")
    run("runs/study/one")
    run("runs/study/no-longer")
    Path("runs/study/study.json").write_text(
        json.dumps({"runs": [{"name": "two"}, {"name": "one"}, {"name": "three"}]})
    )
    return [*map(str, found[:3]), "runs/study/two", "runs/study/one", str(found[3])]


def test_folders_that_hold_runs_stand_for_them(tree: list[str]) -> None:
    assert folders("runs") == tree
    assert folders("runs/normgeo") == tree[:3]
    assert folders("runs/study") == tree[3:5]
    assert folders(".") == tree[:-1], "four folders deep from there"
    assert folders("runs", "runs/normgeo", tree[0]) == tree, "each run counts once"
    assert folders(Path("runs").absolute())[0].endswith(tree[0])


def test_a_report_of_them_is_written_there(tree: list[str]) -> None:
    assert write_report("runs/normgeo", form="md") == Path("runs/normgeo/report.md")
    assert Path("runs/normgeo/report.md").read_text(encoding="utf-8").startswith("# normgeo\n")
    write_report("runs/normgeo", form="md")  # also if a report of it exists in the folder
    assert write_report(["runs"], form="csv") == Path("runs/report.csv")


def test_links_within_are_followed_once_and_others_are_not(tree: list[str], tmp_path: Path) -> None:
    run("elsewhere/x/y")
    Path("runs/linked").symlink_to(Path("elsewhere/x").absolute(), target_is_directory=True)
    Path("runs/normgeo/again").symlink_to("a", target_is_directory=True)
    Path("runs/round").symlink_to(".", target_is_directory=True)
    found = {Path(folder).resolve() for folder in folders("runs")}
    assert found == {Path(folder).resolve() for folder in tree}
    assert folders("runs/linked") == ["runs/linked/y"], "whoever names a link has chosen it"


def test_an_index_that_cannot_be_read_is_said_once_and_done_without(tree: list[str]) -> None:
    Path("runs/study/study.json").write_text("{")
    with pytest.warns(MeasurementWarning, match=r"study\.json is not the index of a study .* read without it"):
        found = folders("runs")
    assert found[3:6] == ["runs/study/no-longer", "runs/study/one", "runs/study/two"]
    with pytest.raises(ConfigurationError, match="is not the index of a study"):
        load_runs(["runs/study"])


@pytest.mark.parametrize(
    "content", ["[" * 5000, '{"runs": [1]}', '{"runs": [{"name": null}]}', "\x00", '{"runs": "ab"}']
)
def test_an_index_of_anything(content: str) -> None:
    Path("study.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"is not the index of a study|No run of study\.json has begun"):
        load_runs(["."])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("runs/nope", r"^runs/nope does not exist; runs has 'normgeo', .*'z'\. Give the folder"),
        ("runs/normgoe", r"^runs/normgoe does not exist; runs has 'normgeo', .*'z'\. Give the folder of a run"),
        ("runs/normgeo/b1", r"^runs/normgeo/b1 does not exist; runs/normgeo has 'b10'"),
        ("runs/normgeo/x/y", r"^runs/normgeo/x/y does not exist; runs/normgeo has "),
        ("./nope/there", r"^nope/there does not exist; "),
        ("../nope", r"^\.\./nope does not exist; "),
        ("rnus", r"^rnus does not exist; .* has 'runs'\. Give"),
        ("a b/c", r"^a b/c does not exist"),
        ("", r"has no record|does not exist"),
    ],
)
def test_what_is_missing_is_said_with_what_is_there(tree: list[str], source: str, message: str) -> None:
    if not source:
        assert folders(source) == tree[:-1]
        return
    with pytest.raises(ConfigurationError, match=message) as refused:
        load_runs([source])
    assert "W&B" not in str(refused.value)
    assert "account" not in str(refused.value)


def test_a_name_that_may_be_of_wandb_is_said_to_be_no_folder_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> Any:
        raise ConfigurationError(f"W&B needs an account to read {path}.")

    monkeypatch.setattr("lightning_normgeo.report.wandb.downloaded_records.read_project", refuse)
    with pytest.raises(ConfigurationError, match=r"^There is no folder lab/x in /.*\. As a project of W&B: W&B needs"):
        load_runs(["lab/x"])
    Path("lab").mkdir()
    with pytest.raises(ConfigurationError, match=r"^lab/x does not exist\. Give"):
        load_runs(["lab/x"])
    with pytest.raises(ConfigurationError, match=r"^W&B needs an account to read lab/x"):
        load_runs(["wandb:lab/x"])


@pytest.mark.parametrize(
    ("page", "read"),
    [
        ("https://wandb.ai/lab/x", "lab/x"),
        ("https://wandb.ai/lab/x/workspace?nw=nwuser", "lab/x"),
        ("https://wandb.ai/lab/x/runs", "lab/x"),
        ("https://wandb.ai/lab/x/runs/abc123?nw=nwuser#charts", "lab/x/abc123"),
        ("https://wandb.ai/lab/x/runs/abc123/overview", "lab/x/abc123"),
    ],
)
def test_the_address_of_a_page_of_wandb_names_its_project_or_run(
    page: str, read: str, tree: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    record = read_record(tree[0])
    monkeypatch.setattr(
        "lightning_normgeo.report.wandb.downloaded_records.read_project", lambda path: asked.append(path) or [record]
    )
    assert [one.record for one in load_runs([page])] == [record]
    assert write_report(page, "report.md", "md").is_file()
    assert set(asked) == {read}


def test_another_address_is_said_to_be_none_of_this_machine() -> None:
    with pytest.raises(ConfigurationError, match=r"^s3://bucket/runs is an address\. Give the path of"):
        load_runs(["s3://bucket/runs"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it is empty"),
        (["config.yaml", "checkpoints/last.ckpt"], r"it holds checkpoints/, config\.yaml\."),
        ([f"f{k:02d}" for k in range(20)], r"it holds f00, .*f07 … \(20 in all\)\."),
    ],
)
def test_a_folder_without_a_record_says_what_it_holds(content: list[str], message: str) -> None:
    Path("some").mkdir()
    for name in content:
        (Path("some") / name).parent.mkdir(exist_ok=True)
        (Path("some") / name).touch()
    with pytest.raises(ConfigurationError, match=rf"^some has no record\.jsonl, up to 4 folders deep; {message}"):
        load_runs(["some"])


def test_a_file_of_another_kind() -> None:
    Path("config.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigurationError, match=r"config\.yaml is no record"):
        load_runs(["config.yaml"])


def test_a_folder_among_thousands_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MOST_FOLDERS", 10)
    for k in range(12):
        Path(f"many/f{k}").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="more than 10 folders"):
        load_runs(["many"])
