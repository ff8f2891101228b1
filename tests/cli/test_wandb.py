"""W&B's own offline log after fit and test, compared with the run's own record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger

from lightning_normgeo import (
    AffineConvergenceMonitor,
    DigitsDataModule,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    ResNetClassifier,
    RobustnessEvaluation,
    read_record,
)
from lightning_normgeo.callbacks._readings.publication.wandb_keys import AGGREGATES, for_wandb, without_chart
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.robustness import load_decisions
from lightning_normgeo.robustness.results.logged_results import COLUMNS, ORDER, TITLES, rows_of
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts import logged_verdicts
from lightning_normgeo.runs.verdicts.claims.claims import VERDICT_KEYS
from support.wandb_log import BLOCK, CHUNK, FIRST, FULL, HEADER, LAST, MIDDLE, WandbRun, raw_records, read_finished


@pytest.fixture(scope="module")
def logged(workplace: Path) -> tuple[WandbRun, Record]:
    """Fit and test with all callbacks, W&B offline and the record side by side; return both logs."""
    import wandb

    record = RecordLogger(str(workplace / "runs"), version="one")
    trainer = pl.Trainer(
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=1,
        limit_test_batches=2,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=[record, WandbLogger(project="normgeo", save_dir=str(workplace), mode="offline")],
        callbacks=[
            OrthogonalityMonitor(),
            NormGrowthMonitor(every_n_steps=2),
            AffineConvergenceMonitor(),
            RobustnessEvaluation(num_images=2),
        ],
    )
    model = ResNetClassifier(arch="resnet18", stem="imagenet")
    data = DigitsDataModule(batch_size=16)
    trainer.fit(model, datamodule=data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)  # few steps: low accuracy
        trainer.test(model, datamodule=data, verbose=False)
    record.finalize("success")
    wandb.finish()
    wandb.teardown()
    return read_finished(workplace), read_record(record.folder)


def test_log_ended_well(logged: tuple[WandbRun, Record]) -> None:
    run, _ = logged
    assert run.exit_code == 0


def sent(record: Record) -> dict[str, list[tuple[int, float]]]:
    """Return the curves that W&B gets: aggregates of the monitors, and all metrics of the project."""
    groups = {key.partition("/")[0] for key in AGGREGATES}
    return {key: v for key, v in record.metrics.items() if key in AGGREGATES or key.partition("/")[0] not in groups}


def test_every_aggregate_of_the_record_is_in_wandb_at_the_same_step(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    assert len(record.metrics) > 60
    assert len(set(AGGREGATES) & set(record.metrics)) > 12
    assert {key: run.points(key) for key in sent(record)} == sent(record)
    assert {key for key in record.metrics if record.is_at_wandb(key)} == set(sent(record))


def test_wandb_has_no_metric_that_the_record_lacks(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    keys = {key for row in run.history for key in row}
    others = {key for key in keys if key not in sent(record) and not key.startswith("_")}
    assert others == {
        "trainer/global_step",
        "about/training",
        "about/keys",
        "about/robustness",
        "robustness/results",
        "robustness/examples",
        "geometry/layers",
    }


def test_layers_of_the_first_block_are_in_the_table(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    table = run.table("geometry/layers")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    layers = {row["layer"] for row in rows}
    assert layers
    assert all(".layer1.0." in f".{layer}" for layer in layers)
    for key, points in record.layers.items():
        for step, values in points:
            here = [row for row in rows if row["step"] == step and row.get(key) is not None]
            there = {row["layer"]: float(f"{row[key]:.9g}") for row in here}  # the record has nine digits
            assert there == {layer: value for layer, value in values.items() if layer in layers and layer in there}


def test_norms_of_layers_are_in_the_artifact_and_not_in_the_summary(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    ((kind, (file,)),) = [entry for name, entry in run.artifacts.items() if name.endswith("-robustness-settings")]
    assert kind == "settings"
    assert json.loads(file.read_text())["weights"] == record.results["robustness"]["weights"]


@pytest.mark.parametrize("wandb_keys", ["aggregates", "all"])
def test_whoever_wants_all_keys_gets_them(wandb_keys: Any) -> None:
    scalars = {"norm_growth/increment": 1.0, "norm_growth/term_momentum": 2.0, "norm_growth/increment/net.1": 3.0}
    monitors = [NormGrowthMonitor(wandb_keys=wandb_keys), OrthogonalityMonitor(layers="net.1")]
    keys = {"all": list(scalars), "aggregates": ["norm_growth/increment"]}
    assert list(for_wandb(scalars, monitors)) == keys[wandb_keys]
    chosen = [NormGrowthMonitor(layers="net.1")]
    assert list(for_wandb(scalars, chosen)) == ["norm_growth/increment", "norm_growth/increment/net.1"]
    with pytest.raises(ConfigurationError, match=r"wandb_keys='some'\): choose one of 'aggregates', 'all'"):
        NormGrowthMonitor(wandb_keys="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("group", ["orthogonality", "orthogonality_control", "norm_growth", "affine", "robustness"])
def test_every_group_of_metrics_is_there(logged: tuple[WandbRun, Record], group: str) -> None:
    run, _ = logged
    assert any(key.startswith(f"{group}/") for row in run.history for key in row)


@pytest.mark.parametrize(
    ("key", "steps"),
    [
        ("orthogonality/max_abs_cos", [0, 1, 2, 3]),
        ("norm_growth/increment", [1, 3]),
        ("affine/abs_beta_minus_mu_mean", [0, 1, 2, 3]),
        ("train/loss", [0, 1, 2, 3]),
        ("val/loss", [1, 3]),
    ],
)
def test_steps_are_those_of_lightning(logged: tuple[WandbRun, Record], key: str, steps: list[int]) -> None:
    run, _ = logged
    assert [step for step, _ in run.points(key)] == steps


def test_table_holds_the_robustness_results(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    table = run.table("robustness/results")
    assert table["columns"] == list(TITLES.values())
    rows = rows_of([dict(zip(table["columns"], row, strict=True)) for row in table["data"]])
    results = record.results["robustness"]["results"]
    assert rows == [{column: row[column] for column in COLUMNS} for row in results]
    assert [row["attack"] for row in rows] == ["clean", "gaussian", "bim"]
    assert all(row["n"] == 32 for row in rows)


def test_what_became_of_each_sample_is_an_artifact(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    ((kind, (file,)),) = [entry for name, entry in run.artifacts.items() if name.endswith("-robustness")]
    assert kind == "evaluation"
    decisions = load_decisions(file)
    for row in record.results["robustness"]["results"]:
        assert int(decisions.of(row["attack"]).correct.sum()) == row["correct"]


def test_example_images_are_files(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    files = run.images("robustness/examples")
    assert len(files) == 2
    for file, (name, _) in zip(files, record.images["robustness/examples"], strict=True):
        assert file.read_bytes().startswith(b"\x89PNG")
        assert _pixels(file) == _pixels(record.folder / name)


def test_captions_say_how_to_read_the_images(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    (captions,) = [row["robustness/examples"]["captions"] for row in run.history if "robustness/examples" in row]
    assert captions == [f"{caption}. {ORDER}" for _, caption in record.images["robustness/examples"]]


def test_verdicts_are_those_of_the_record(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    tables = [run.table(key) for key in ("about/training", "about/robustness")]
    assert [table["columns"] for table in tables] == [logged_verdicts.COLUMNS] * 2
    assert [row for table in tables for row in table["data"]] == logged_verdicts.verdict_rows(record)
    headlines = {key: value for key, value in run.summary.items() if key in logged_verdicts.headlines(record)}
    assert headlines == pytest.approx(logged_verdicts.headlines(record), rel=1e-6)
    names = ["max_abs_cos", "increments_explained", "accuracy_clean", "accuracy_noise", "accuracy_attack"]
    assert list(headlines) == [f"about/{name}" for name in names]


def test_every_key_is_explained(logged: tuple[WandbRun, Record]) -> None:
    run, _ = logged
    explained = {row[0]: row[1:] for row in run.table("about/keys")["data"]}
    groups = {key.partition("/")[0] for key in AGGREGATES}
    keys = {key for row in run.history for key in row if key.partition("/")[0] in groups}
    assert {*keys, *run.table("geometry/layers")["columns"][2:]} == set(explained)
    assert all(unit and meaning for unit, meaning in explained.values())


def test_points_that_are_in_the_table_have_no_charts(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    single = [key for key in record.metrics if key.endswith(("/ci_low", "/ci_high", "/n"))]
    medians = {key for key in record.metrics if key.startswith("affine/") and key.endswith("_median")}
    verdicts = medians & set(VERDICT_KEYS) | {"norm_growth/eq16_applies", "norm_growth/predicted_momentum"}
    assert run.hidden == {*single, "robustness/clean/accuracy_drop", *verdicts}
    assert len(medians & verdicts) == 3
    assert len(single) == 9


def test_keys_of_layers_that_nobody_chose_have_no_charts() -> None:
    keys = ["norm_growth/increment", "norm_growth/increment/net.1", "orthogonality/rms_cos/net.1"]
    monitors = [NormGrowthMonitor(wandb_keys="all"), OrthogonalityMonitor(layers="net.1")]
    assert without_chart(keys, monitors) == ["norm_growth/increment/net.1"]


def test_hyperparameters_are_in_the_config(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    assert run.config["arch"] == record.settings["arch"] == "resnet18"
    assert run.config["batch_size"] == 16


@pytest.mark.filterwarnings("ignore:WandbLogger failed to log the (table|verdicts)")
def test_a_failing_wandb_does_not_stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(WandbLogger, "log_metrics", broken)
    model, data = ResNetClassifier(arch="resnet18", stem="imagenet"), DigitsDataModule(batch_size=4)
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    record = RecordLogger("runs", version="one")
    trainer = pl.Trainer(
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        log_every_n_steps=1,
        logger=[WandbLogger(mode="offline"), record],
        callbacks=[OrthogonalityMonitor()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    words = r"WandbLogger failed to log a measured step.*no route to host.*Training goes on"
    with pytest.warns(UserWarning, match=words):
        trainer.fit(model, datamodule=data)
    assert trainer.global_step == 1
    assert "orthogonality/max_abs_cos" in read_record(record.folder).metrics


def test_package_does_not_import_wandb() -> None:
    code = (
        "import sys; from lightning_normgeo import OrthogonalityMonitor, RobustnessEvaluation, RecordLogger;"
        "print(any(name == 'wandb' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "False"


def _pixels(file: Path) -> bytes:
    from PIL import Image

    with Image.open(file) as image:
        return image.tobytes()


def _chunk(kind: int, data: bytes) -> bytes:
    return CHUNK.pack(zlib.crc32(data, zlib.crc32(bytes([kind]))), len(data), kind) + data


def test_reader_joins_the_parts_of_a_record_and_skips_block_ends() -> None:
    size = BLOCK - len(HEADER) - CHUNK.size - 3  # leaves three bytes, too few for a chunk
    buffer = HEADER + _chunk(FULL, b"a" * size) + b"\0" * 3
    buffer += _chunk(FIRST, b"b") + _chunk(MIDDLE, b"c") + _chunk(LAST, b"d")
    assert list(raw_records(buffer)) == [b"a" * size, b"bcd"]


def test_reader_leaves_out_a_torn_tail() -> None:
    buffer = HEADER + _chunk(FULL, b"whole") + _chunk(FULL, b"torn")[:-1]
    assert list(raw_records(buffer)) == [b"whole"]


@pytest.mark.parametrize(
    ("buffer", "message"),
    [(b"PK\x03\x04....", "not a W&B"), (HEADER + _chunk(FULL, b"x")[:-1] + b"y", "wrong checksum at byte 7")],
    ids=["another file", "damaged"],
)
def test_reader_refuses(buffer: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(raw_records(buffer))
