"""RecordLogger and read_record: no logged value is lost, however the run ends."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from lightning_normgeo import DigitsDataModule, NormGrowthMonitor, RecordLogger, ResNetClassifier, read_record
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close loggers that tests leave open on purpose."""
    written: list[RecordLogger] = []
    original = RecordLogger._write

    def write(self: RecordLogger, kind: str, **fields: Any) -> None:
        written.append(self)
        original(self, kind, **fields)

    monkeypatch.setattr(RecordLogger, "_write", write)
    yield
    for logger in written:
        if logger._spool is not None:
            logger._spool.close()


def test_everything_logged_is_read_back() -> None:
    logger = RecordLogger("out", name="exp", version="one")
    logger.log_hyperparams({"lr": 0.1, "nested": {"path": Path("a")}})
    logger.log_hyperparams(Namespace(lr=0.2, betas=(0.9, 0.99)))
    logger.log_metrics({"a/b": 1 / 3, "c": 2}, step=0)
    logger.log_metrics({"a/b": torch.tensor(0.5)}, step=7)
    logger.log_metrics({"c": 3.0})
    logger.log_layers({"q": {"layer1.0.conv1": 1e-30, "fc": 2.0}}, step=7)
    logger.log_results("scores", {"results": [{"attack": "clean", "accuracy": 0.1}]})
    logger.finalize("success")
    record = read_record(logger.folder)
    assert record.folder == Path("out/exp/one")
    assert record.metrics == {"a/b": [(0, 1 / 3), (7, 0.5)], "c": [(0, 2.0), (0, 3.0)]}
    assert record.layers == {"q": [(7, {"layer1.0.conv1": 1e-30, "fc": 2.0})]}
    assert record.settings == {"lr": 0.2, "nested": {"path": "a"}, "betas": [0.9, 0.99]}
    assert record.results == {"scores": {"results": [{"attack": "clean", "accuracy": 0.1}]}}
    assert record.complete
    assert read_record(logger.path).metrics == record.metrics


def test_every_line_is_strict_json_with_kind_and_time() -> None:
    logger = RecordLogger("out")
    logger.log_hyperparams({"inf": math.inf, "what": {1, 2}, "f": torch.float32})
    logger.log_metrics({"a": 1.0}, step=1)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in logger.path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["environment", "settings", "metrics"]
    assert all(line["time"] > 1.7e9 for line in lines)


def test_values_that_are_not_finite_are_kept_as_such() -> None:
    logger = RecordLogger("out")
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf), "d": 1.0}, step=0)
    logger.log_layers({"q": {"conv1": math.nan, "fc": 2.0}}, step=0)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in logger.path.read_text().splitlines()]
    assert lines[1]["values"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 1.0}
    record = read_record(logger.folder)
    assert math.isnan(record.metrics["a"][0][1])
    assert [record.metrics[key] for key in "bcd"] == [[(0, math.inf)], [(0, -math.inf)], [(0, 1.0)]]
    ((step, values),) = record.layers["q"]
    assert (step, values["fc"]) == (0, 2.0)
    assert math.isnan(values["conv1"])


def test_what_is_no_number_is_left_out_and_stops_nobody() -> None:
    logger = RecordLogger("out")
    with pytest.warns(MeasurementWarning, match="RecordLogger keeps numbers only, and leaves out 'text', str"):
        logger.log_metrics({"text": "great", "a": 1.0}, step=0)
    with pytest.warns(MeasurementWarning, match=r"cannot keep the images 'them'.*It takes arrays of bytes"):
        logger.log_image("them", ["what"])
    with pytest.warns(MeasurementWarning, match="RecordLogger cannot keep settings: .*no text"):
        logger.log_hyperparams({"speechless": Speechless()})
    assert read_record(logger.folder).metrics == {"a": [(0, 1.0)]}


class Speechless:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


def test_each_call_is_on_disk_when_it_returns() -> None:
    logger = RecordLogger("out")
    for step in range(3):
        logger.log_metrics({"a": float(step)}, step=step)
        assert read_record(logger.folder).metrics["a"][-1] == (step, float(step))
    assert not read_record(logger.folder).complete


KILLED = """
import os, signal
from lightning_normgeo import RecordLogger
logger = RecordLogger("out", version="killed")
for step in range(50):
    logger.log_metrics({"loss": step / 7}, step=step)
logger.log_layers({"q": {"a": 1.0}}, step=50)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_run_keeps_every_line() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    record = read_record("out/normgeo/killed")
    assert record.metrics == {"loss": [(step, step / 7) for step in range(50)]}
    assert record.layers == {"q": [(50, {"a": 1.0})]}
    assert not record.complete


def test_torn_last_line_is_skipped_and_resuming_goes_on_after_it() -> None:
    first = RecordLogger("out", version="one")
    first.log_metrics({"a": 1.0}, step=0)
    with first.path.open("a") as file:
        file.write('{"kind": "metrics", "step": 1, "val')
    assert read_record(first.folder).metrics == {"a": [(0, 1.0)]}
    again = RecordLogger("out", version="one")
    again.log_metrics({"a": 2.0}, step=1)
    again.finalize("success")
    assert read_record(first.folder).metrics == {"a": [(0, 1.0), (1, 2.0)]}
    assert read_record(first.folder).complete


def test_record_cut_off_at_any_byte_is_readable() -> None:
    logger = RecordLogger("out")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_hyperparams({"x": "γ² − σ²", "text": "{}"})
    logger.log_metrics({"a": 2.0}, step=1)
    whole = logger.path.read_bytes()
    for end in range(len(whole)):
        logger.path.write_bytes(whole[:end])
        record = read_record(logger.folder)
        assert record.metrics.get("a", []) in ([], [(0, 1.0)], [(0, 1.0), (1, 2.0)])
        assert record.settings in ({}, {"x": "γ² − σ²", "text": "{}"})


def test_resuming_an_ended_run_appends() -> None:
    for step in range(2):
        logger = RecordLogger("out", version="one")
        logger.log_metrics({"a": float(step)}, step=step)
        logger.finalize("success")
    logger.log_metrics({"a": 2.0}, step=2)  # as trainer.test does after fit
    record = read_record(logger.folder)
    assert record.metrics["a"] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert not record.complete


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"save_dir": 5}, r"RecordLogger\(save_dir=5\): must be the path of a folder, as 'runs'"),
        ({"save_dir": None}, r"save_dir=None\): must be the path of a folder"),
        ({"name": 5}, r"name=5\): must be text"),
        ({"version": 3}, r"version=3\): must be text, as 'first'"),
    ],
)
def test_names_that_are_no_text_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RecordLogger(**given)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_unwritable_folder_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigurationError, match=r"RecordLogger\(save_dir='.*file.*'\): cannot write there \(.+\)\. Cho"
    ):
        RecordLogger(str(tmp_path / name))


def test_unwritable_run_folder_below_a_writable_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "normgeo").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot write there"):
        _ = RecordLogger(str(tmp_path)).version


def test_runs_of_the_same_second_get_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_normgeo.runs.folders.new_folders.time.strftime", lambda _: "20260101-000000")
    loggers = [RecordLogger("out") for _ in range(3)]
    folders = [logger.folder for logger in loggers]
    assert [folder.name for folder in folders] == ["20260101-000000", "20260101-000000-1", "20260101-000000-2"]
    assert all(folder.is_dir() for folder in folders)
    assert [logger.folder for logger in loggers] == folders


def test_results_replace_each_other_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RecordLogger("out")
    logger.log_results("r", {"value": 1})
    target = logger.folder / "r.json"

    def interrupted(source: Path, destination: Path) -> None:
        assert json.loads(Path(source).read_text()) == {"value": 2}
        assert json.loads(Path(destination).read_text()) == {"value": 1}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lightning_normgeo.runs.folders.new_folders.os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logger.log_results("r", {"value": 2})
    assert json.loads(target.read_text()) == {"value": 1}
    logger.log_results("r", {"value": 3, "nan": math.nan})
    assert json.loads(target.read_text()) == {"value": 3, "nan": "nan"}
    assert sorted(path.name for path in logger.folder.iterdir()) == ["r.json", "record.jsonl"]


def test_images_are_saved_with_captions() -> None:
    images = [np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8) for i in range(2)]
    logger = RecordLogger("out")
    logger.log_image("robustness/examples", images, step=3, caption=["one", "two"])
    logger.log_image("plain", images[:1])
    record = read_record(logger.folder)
    assert [caption for _, caption in record.images["robustness/examples"]] == ["one", "two"]
    assert [caption for _, caption in record.images["plain"]] == [""]
    for (file, _), pixels in zip(record.images["robustness/examples"], images, strict=True):
        with Image.open(record.folder / file) as image:
            assert np.array_equal(np.asarray(image), pixels)


def test_pickled_logger_goes_on_in_the_same_record() -> None:
    logger = RecordLogger("out")
    logger.log_metrics({"a": 1.0}, step=0)
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"a": 2.0}, step=1)
    assert copy.folder == logger.folder
    assert read_record(logger.folder).metrics == {"a": [(0, 1.0), (1, 2.0)]}


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_no_record(place: str) -> None:
    with pytest.raises(ConfigurationError, match=r"does not exist. Give the folder of a run"):
        read_record(place)


def test_other_ranks_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = RecordLogger("out")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_results("r", {})
    logger.finalize("success")
    assert logger.version
    assert not Path("out").exists()


def test_beside_lightnings_csv_logger_in_a_real_run() -> None:
    record, table = RecordLogger("out"), CSVLogger("out", name="csv")
    trainer = pl.Trainer(
        max_steps=3,
        limit_val_batches=1,
        accelerator="cpu",
        log_every_n_steps=1,
        logger=[table, record],
        callbacks=[NormGrowthMonitor()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(ResNetClassifier(arch="resnet18", stem="imagenet"), datamodule=DigitsDataModule(batch_size=4))
    read = read_record(record.folder)
    assert read.complete
    assert [step for step, _ in read.metrics["norm_growth/increment"]] == [0, 1, 2]
    with Path(table.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for key, points in read.metrics.items():
        assert [(int(row["step"]), float(row[key])) for row in rows if row.get(key)] == points, key
    assert read.settings["arch"] == "resnet18"


@pytest.mark.parametrize("status", ["exception", "interrupt"])
def test_how_a_run_ended_is_recorded(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    error = RuntimeError("out of cheese") if status == "exception" else KeyboardInterrupt()

    def fail(self: ResNetClassifier, batch: object, batch_idx: int) -> None:
        if batch_idx == 1:
            raise error
        return original(self, batch, batch_idx)

    original = ResNetClassifier.training_step
    monkeypatch.setattr(ResNetClassifier, "training_step", fail)
    record = RecordLogger("out")
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        log_every_n_steps=1,
        logger=record,
        limit_val_batches=0,
        callbacks=[NormGrowthMonitor()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer.fit(ResNetClassifier(arch="resnet18", stem="imagenet"), datamodule=DigitsDataModule(batch_size=4))
    last = json.loads(record.path.read_text().splitlines()[-1])
    assert (last["kind"], last["status"]) == ("end", "failed")
    assert len(read_record(record.folder).metrics["norm_growth/increment"]) == 1


def test_a_run_that_goes_on_from_a_checkpoint_replaces_what_it_had_logged_beyond() -> None:
    for steps in ((0, 10, 20, 30), (20, 30)):  # killed after 30; the checkpoint is of step 15
        logger = RecordLogger("out", version="one")
        for step in steps:
            logger.log_metrics({"q": float(len(steps))}, step=step)
            logger.log_layers({"q": {"conv1": float(len(steps))}}, step=step)
        logger.log_metrics({"once a run": 1.0}, step=None)
        logger._spool.close()
    record = read_record(logger.folder)
    assert record.metrics["q"] == [(0, 4.0), (10, 4.0), (20, 2.0), (30, 2.0)]
    assert record.layers["q"] == [(step, {"conv1": value}) for step, value in record.metrics["q"]]
    assert record.metrics["once a run"] == [(0, 1.0)]


def test_one_process_keeps_what_it_logs_twice() -> None:
    logger = RecordLogger("out")
    for value in (1.0, 2.0):
        logger.log_metrics({"val/loss": value}, step=4)
        logger.finalize("success")
    assert read_record(logger.folder).metrics["val/loss"] == [(4, 1.0), (4, 2.0)]


def test_what_it_ran_on() -> None:
    logger = RecordLogger("out")
    logger.log_metrics({"a": 1.0})
    logger.finalize("success")
    record = read_record(logger.folder)
    assert torch.__version__.startswith(record.environment["torch"])
    assert record.environment["threads"] == str(torch.get_num_threads())
    assert {"python", "pytorch-lightning", "lightning-normgeo", "system", "cpu", "cores"} <= set(record.environment)
    assert 0 <= record.ended - record.begun < 60
