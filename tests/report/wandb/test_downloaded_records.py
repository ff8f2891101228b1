"""Runs read back from W&B equal their local records; a missing run gives a clear error."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_normgeo import verdicts
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.compared_runs import compare_runs, load_runs
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.wandb import downloaded_records
from lightning_normgeo.report.wandb.downloaded_records import read_project
from lightning_normgeo.robustness import load_decisions
from lightning_normgeo.runs.records.record import Record
from support.wandb_backend import ENTITY, WandbBackend
from support.wandb_runs import fit, lightning_cli
from support.wandb_server import KEY, needs_pinned_wandb, serve

pytestmark = [needs_pinned_wandb, lightning_cli, pytest.mark.timeout(180)]


@dataclass
class Both:
    """A run of the command line with W&B online: its own record, and the record read back from the server."""

    local: Record
    read: Record
    named: Record


@pytest.fixture(scope="module")
def both(workplace: Path) -> Both:
    import wandb

    with serve() as server:
        local = fit(workplace, "online")
        assert not list((workplace / "runs").rglob("offline-run-*"))
        (read,) = read_project(f"{ENTITY}/normgeo", workplace / "read")
        (named,) = read_project(f"{ENTITY}/normgeo/{read.settings['wandb']['id']}", workplace / "again")
        wandb.teardown()
        assert server.refused == []
    return Both(local, read, named)


def test_curves_are_those_of_the_record(both: Both) -> None:
    assert len(both.read.metrics) > 20
    local = {
        key: sorted(dict(points).items())  # epoch is logged twice per step
        for key, points in both.local.metrics.items()
        if both.local.is_at_wandb(key)
    }
    assert both.read.metrics == local


def test_settings_are_those_of_the_record(both: Both) -> None:
    assert both.read.settings == both.local.settings
    assert both.read.settings["wandb"]["id"]


def test_layers_are_those_of_the_record_where_wandb_has_a_table(both: Both) -> None:
    tabled = {key: points for key, points in both.local.layers.items() if key.startswith("norm_growth")}
    assert len(tabled) > 20
    there = {key: points for key, points in both.read.layers.items() if key.startswith("norm_growth")}
    nine = {  # digits, which the local record has
        key: [(step, {layer: float(f"{value:.9g}") for layer, value in row.items()}) for step, row in points]
        for key, points in there.items()
    }
    assert nine == tabled
    first_block = [layer for points in both.read.layers["orthogonality/rms_cos"] for layer in points[1]]
    assert first_block
    assert all("layer1.0." in layer for layer in first_block)


def test_robustness_is_that_of_the_record(both: Both) -> None:
    local, read = (record.results["robustness"] for record in (both.local, both.read))
    assert read == {key: value for key, value in local.items() if key != "weights"}  # these are in the artifact
    assert [row["attack"] for row in read["results"]] == ["clean", "gaussian", "bim"]
    assert sum(n for _, n in read["results"][0]["by_class"].values()) == 16


def test_verdicts_are_those_of_the_record(both: Both) -> None:
    found = verdicts(both.local)
    assert verdicts(both.read) == found
    assert found["equation_16"].reason == "weight decay 0.001"
    assert found["gamma_sigma"].word == "undecided"
    (told,) = both.read.observations
    assert told == {key: value for key, value in both.local.observed.items() if key != "wandb_keys"}


def test_decisions_are_where_reports_look_for_them(both: Both) -> None:
    local, read = (load_decisions(record.folder / "robustness.npz") for record in (both.local, both.read))
    assert read.attacks == local.attacks == ["clean", "gaussian", "bim"]
    for attack in local.attacks:
        assert all(
            map(
                bool,
                [(a == b).logical_or(a.isnan()).all() for a, b in zip(read.of(attack), local.of(attack), strict=True)],
            )
        )


def test_pictures_are_those_of_the_record(both: Both) -> None:
    local, read = (
        [(pixels(record.folder / file), caption) for file, caption in record.images["robustness/examples"]]
        for record in (both.local, both.read)
    )
    assert read == local
    assert len(read) == 2


def test_environment_and_times_are_those_of_the_run(both: Both) -> None:
    names = {"python", "torch", "pytorch-lightning", "wandb", "cpu", "cores"}
    assert {name: both.read.environment[name] for name in names} == {
        name: both.local.environment[name] for name in names
    }
    assert both.read.complete
    assert both.local.begun <= both.read.begun <= both.read.ended <= both.local.ended


def test_tables_of_a_report_are_the_same(both: Both) -> None:
    local, read = (all_tables(compare_runs([record])) for record in (both.local, both.read))
    names = [table.anchor for table in local]
    assert [table.anchor for table in read] == names
    assert {"robustness", "geometry"} <= set(names)
    for mine, other in zip(local, read, strict=True):
        if mine.anchor != "environment":  # W&B does not store all of it
            shared = [mine.columns.index(column) for column in other.columns]  # W&B lacks the medians
            assert len(shared) > 0.6 * len(mine.columns)
            assert [row[1:] for row in other.rows] == [[row[k] for k in shared[1:]] for row in mine.rows]


def test_one_run_can_be_named(both: Both) -> None:
    assert both.named.metrics == both.read.metrics
    assert both.named.results == both.read.results


@pytest.fixture
def server() -> Iterator[WandbBackend]:
    import wandb

    with serve() as server:
        yield server
        wandb.teardown()


def logged(log: Callable[[Any], None], **settings: Any) -> str:
    """Log a run by hand and return its id."""
    import wandb

    run = wandb.init(project="foreign", entity=ENTITY, mode="online", **settings)
    log(run)
    run.finish()
    return str(run.id)


@pytest.mark.usefixtures("server")
def test_runs_of_other_projects_are_read_as_they_are(tmp_path: Path) -> None:
    def log(run: Any) -> None:
        run.log({"loss": 2.0, "ok": True, "note": "text"})
        run.log({"loss": float("nan"), "only/once": 1})
        run.log({"loss": 0.5})

    first = logged(log, name="gn/one", config={"lr": 0.1, "model": {"norm": "gn"}})
    second = logged(lambda run: None, name="..", config={"lr": 0.2})
    records = read_project(f"{ENTITY}/foreign", tmp_path / "read")
    assert [record.settings["wandb"]["id"] for record in records] == [first, second]
    assert [record.folder for record in records] == [
        tmp_path / "read" / first / "gn-one",
        tmp_path / "read" / second / second,
    ]
    assert records[0].metrics == {"loss": [(0, 2.0), (2, 0.5)], "only/once": [(1, 1.0)]}
    assert (records[1].metrics, records[1].results, records[1].images, records[1].layers) == ({}, {}, {}, {})
    assert compare_runs(records)[0].differing == {"lr": "0.1", "model.norm": "gn"}


@pytest.mark.usefixtures("server")
def test_a_run_that_went_on_from_a_checkpoint_counts_once() -> None:
    def log(*steps: int, value: float) -> Callable[[Any], None]:
        return lambda run: [run.log({"loss": value, "trainer/global_step": step}) for step in steps] and None

    run = logged(log(1, 2, 3, 4, value=1.0), id="again", resume="allow")
    logged(log(3, 4, 5, value=2.0), id="again", resume="allow")
    (record,) = read_project(f"{ENTITY}/foreign/{run}")
    assert record.metrics["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


@pytest.mark.usefixtures("server")
def test_settings_and_warnings_of_an_evaluation_are_read_from_the_summary(tmp_path: Path) -> None:
    import wandb

    document = {"settings": {"threat": {"eps": 0.03, "lower": None}, "attacks": {}}, "warnings": ["too weak"]}

    def log(run: Any) -> None:
        run.log({"robustness/table": wandb.Table(columns=["attack", "accuracy"], data=[["clean", 0.5]])})
        run.summary["robustness"] = document

    logged(log)
    (record,) = read_project(f"{ENTITY}/foreign", tmp_path / "read")
    assert record.results["robustness"] == {
        **document,
        "results": [{"attack": "clean", "accuracy": 0.5, "by_class": {}}],
    }


def test_a_run_under_way_is_not_complete_and_lost_files_are_left_out(server: WandbBackend) -> None:
    run = logged(lambda run: run.log({"loss": 1.0, "x": [picture()]}))
    stored = server.runs[ENTITY, "foreign", run]
    stored.exit_code = None
    stored.files.clear()
    (record,) = read_project(f"{ENTITY}/foreign")
    assert not record.complete
    assert record.images == {"x": []}
    assert record.environment == {}


def picture() -> Any:
    import wandb

    return wandb.Image(Image.new("RGB", (2, 2)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lab/nothing", r"^lab/nothing cannot be read from W&B \(.*Could not find project nothing\)\. Check the name"),
        ("lab/empty", r"^lab/empty has no runs at W&B\. Upload some with wandb sync"),
        ("lab/empty/run", r"^lab/empty/run cannot be read from W&B \(.*Could not find run"),
    ],
    ids=["no project", "no runs", "no run"],
)
def test_what_is_not_there(path: str, message: str, server: WandbBackend) -> None:
    server.projects.add("empty")
    with pytest.raises(ConfigurationError, match=message) as refused:
        load_runs([f"wandb:{path}"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, r"^W&B needs an account \(.*\)\. Run wandb login, or set WANDB_API_KEY; reports of local folders"),
        (
            KEY[::-1].upper(),
            r"^W&B at http://127.* cannot be reached or refuses the account \(.*401.*\)\. Check the network",
        ),
    ],
    ids=["none", "unknown"],
)
def test_account(key: str | None, message: str, server: WandbBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY") if key is None else monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(ConfigurationError, match=message):
        load_runs(["wandb:lab/project"])
    assert "Runs" not in server.asked


@pytest.mark.usefixtures("server")
def test_no_network_is_said_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # the port is bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(downloaded_records, "_PATIENCE", 1)
        with pytest.raises(ConfigurationError, match=r"W&B at http://127.* cannot be reached .*Check the network"):
            read_project("lab/project")


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()
