"""``wandb sync`` of an offline run sends what was recorded, key by key, step by step, byte by byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.report.compared_runs import compare_runs
from lightning_normgeo.report.wandb.report_spec import build_report
from lightning_normgeo.report.wandb.runset import columns
from lightning_normgeo.robustness.results.logged_results import ORDER
from lightning_normgeo.runs.records.record import Record
from support.wandb_backend import ENTITY, StoredRun, WandbBackend
from support.wandb_log import WandbRun, read_finished
from support.wandb_runs import fit, lightning_cli
from support.wandb_server import needs_pinned_wandb, serve
from support.wandb_specs import spec_of

pytestmark = [needs_pinned_wandb, lightning_cli, pytest.mark.timeout(180)]


@dataclass
class Synced:
    """An offline run of the command line, and what the server received."""

    record: Record
    log: WandbRun
    server: WandbBackend
    run: StoredRun


@pytest.fixture(scope="module")
def synced(workplace: Path) -> Iterator[Synced]:
    record = fit(workplace, "offline")
    log = read_finished(workplace / "runs" / "wandb")
    with serve() as server:
        wandb_command("sync", str(log.folder))
        ((path, run),) = server.runs.items()
        assert path == (ENTITY, "normgeo", record.settings["wandb"]["id"])
        yield Synced(record, log, server, run)


def wandb_command(*arguments: str) -> str:
    """Run W&B's command line and return its output."""
    command = [sys.executable, "-m", "wandb", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_server_understood_everything_and_the_run_has_ended(synced: Synced) -> None:
    assert synced.server.refused == []
    assert synced.run.exit_code == synced.log.exit_code == 0
    assert synced.record.complete


def test_rows_arrive_as_they_were_logged(synced: Synced) -> None:
    assert len(synced.run.history) >= 9
    assert synced.run.history == synced.log.history


def test_every_curve_of_the_record_arrives_with_its_steps(synced: Synced) -> None:
    arrived = WandbRun(synced.log.folder, history=synced.run.history)
    assert len(synced.record.metrics) > 60
    sent = {key: v for key, v in synced.record.metrics.items() if synced.record.is_at_wandb(key)}
    assert len(sent) > 20
    assert {key: arrived.points(key) for key in sent} == sent
    assert [step for step, _ in arrived.points("norm_growth/increment")] == [0, 1, 2]


def test_summary_holds_the_last_values(synced: Synced) -> None:
    last = {key: points[-1][1] for key, points in synced.record.metrics.items() if synced.record.is_at_wandb(key)}
    assert {key: synced.run.summary.get(key) for key in last} == last


def test_settings_arrive(synced: Synced) -> None:
    arrived = {key: entry["value"] for key, entry in synced.run.config.items()}
    assert arrived["config"] == synced.record.settings["config"]
    assert arrived["config"]["optimizer"]["init_args"]["weight_decay"] == 0.001
    assert arrived["arch"] == "resnet18"


@pytest.mark.parametrize(
    "key", ["about/training", "about/keys", "about/robustness", "robustness/results", "geometry/layers"]
)
def test_tables_arrive(key: str, synced: Synced) -> None:
    (entry,) = [row[key] for row in synced.run.history if key in row]
    arrived = json.loads(synced.run.files[entry["path"]])
    assert len(arrived["data"]) == entry["nrows"]
    assert arrived == synced.log.table(key)


def test_pictures_arrive(synced: Synced) -> None:
    (entry,) = [row["robustness/examples"] for row in synced.run.history if "robustness/examples" in row]
    arrived = [synced.run.files[name] for name in entry["filenames"]]
    assert arrived == [file.read_bytes() for file in synced.log.images("robustness/examples")]
    captions = [f"{caption}. {ORDER}" for _, caption in synced.record.images["robustness/examples"]]
    assert entry["captions"] == captions
    assert len(captions) == 2


def test_what_became_of_each_sample_arrives(synced: Synced) -> None:
    (artifact,) = [one for one in synced.server.artifacts.values() if one.kind == "evaluation"]
    assert artifact.committed
    assert artifact.path == (*synced.run.path[:2], f"{synced.run.path[2]}-robustness")
    assert artifact.files["robustness.npz"] == (synced.record.folder / "robustness.npz").read_bytes()


def test_the_reader_of_wandb_itself_says_the_same(synced: Synced) -> None:
    (path,) = synced.log.folder.glob("run-*.wandb")
    lines = [json.loads(line) for line in wandb_command("leet", "inspect", "--json", str(path)).splitlines()]
    rows = [line["history"]["item"] for line in lines if line["type"] == "history"]
    assert [_flat(row) for row in rows] == [_flat(row) for row in synced.log.history]
    sent = {key: v for key, v in synced.record.metrics.items() if synced.record.is_at_wandb(key)}
    assert {key: [(r["trainer/global_step"], r[key]) for r in rows if key in r] for key in sent} == sent
    config: dict[str, Any] = {}
    for line in lines:
        config |= line["config"]["update"] if line["type"] == "config" else {}
    assert config["config"] == synced.record.settings["config"]
    assert "exit" in {line["type"] for line in lines}


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_report_asks_for_what_is_there(synced: Synced) -> None:
    runs = compare_runs([synced.record])
    spec = spec_of(build_report(runs, ENTITY, "normgeo", [], "one run"))
    panels = [panel["config"] for panel in _found(spec, "panels") if "config" in panel]
    metrics = [key for panel in panels for key in panel.get("metrics", [])]
    assert len(metrics) > 15
    arrived = {key for row in synced.run.history for key in row}
    assert set(metrics) <= arrived & set(synced.run.summary)
    assert {panel["xAxis"] for panel in panels if "xAxis" in panel} == {"trainer/global_step"} <= arrived
    assert {key for panel in panels for key in panel.get("mediaKeys", [])} == {"robustness/examples"} <= arrived
    assert {name.removeprefix("summary:") for name in columns(runs)[1:]} <= set(synced.run.summary)
    shown = {entry["value"][0] for entry in _found(spec, "filters") if entry.get("key", {}).get("name") == "name"}
    assert shown == {synced.run.path[2]}


def test_a_run_that_went_on_offline_is_one_run_after_sync(tmp_path: Path) -> None:
    import wandb

    folders = []
    for steps in ((1, 2, 3), (3, 4)):  # killed after a checkpoint at 2
        run = wandb.init(project="killed", id="again", mode="offline", resume="allow", dir=str(tmp_path))
        folders.append(str(Path(run.dir).parent))
        for step in steps:
            run.log({"loss": 1 / step, "trainer/global_step": step})
        run.finish()
        (tmp_path / "wandb").rename(tmp_path / f"wandb{len(folders)}")  # runs started in the same second share a folder
        folders[-1] = folders[-1].replace("/wandb/", f"/wandb{len(folders)}/")
    wandb.teardown()
    with serve() as server:
        wandb_command("sync", "-e", "team", "-p", "other", *folders)
        ((path, run),) = server.runs.items()
    assert path == ("team", "other", "again")
    arrived = WandbRun(tmp_path, history=run.history)
    assert arrived.points("loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 1 / 3), (4, 0.25)]
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3, 4]


def _found(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the entries of all lists with a given name, at any depth."""
    if isinstance(value, list):
        return [entry for one in value for entry in _found(one, name)]
    if not isinstance(value, dict):
        return []
    here = value[name] if isinstance(value.get(name), list) else []
    return [*here, *(entry for one in value.values() for entry in _found(one, name))]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in W&B's reader's form: a nested dictionary's keys are joined by dots."""
    found = {}
    for key, value in row.items():
        nested = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {}
        found.update(_flat(nested) if nested else {key: value})
    return found
