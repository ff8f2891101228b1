"""Runs whose losses are no longer finite are reported: in the record, at the end, in studies and reports."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_normgeo import NormGrowthMonitor, RecordLogger, read_record
from lightning_normgeo.report import write_report
from lightning_normgeo.runs.folders.run_folder import RunFolder
from lightning_normgeo.runs.records.record import NotFinite, Record
from lightning_normgeo.study.definition import Study
from lightning_normgeo.study.display import listing
from lightning_normgeo.study.study_index import Index
from support.projects import Project, images, trainer
from support.records import write_run

NAN, INF = math.nan, math.inf


def record(**curves: list[float]) -> Record:
    metrics = {key.replace("__", "/"): list(enumerate(values)) for key, values in curves.items()}
    return Record(Path("run"), metrics=metrics)


@pytest.mark.parametrize(
    ("curves", "found"),
    [
        ({"train__loss": [1.0, 2.0]}, None),
        ({}, None),
        ({"train__loss": [1.0, INF, NAN]}, ("train/loss", 1)),
        ({"loss": [NAN]}, ("loss", 0)),
        ({"train__loss": [1.0, INF, 2.0]}, None),  # a step that was skipped
        ({"train__loss": [NAN, 1.0, NAN]}, ("train/loss", 2)),
        ({"train__loss": [1.0, 2.0], "val__auroc": [0.5, NAN]}, None),  # one class in a batch
        ({"train__loss": [1.0, 2.0, 3.0], "aux_loss": [NAN, NAN, NAN]}, None),  # no gradient
        ({"d_loss": [1.0, NAN, NAN], "g_loss": [1.0, 1.0, NAN]}, ("d_loss", 1)),
        ({"train_loss_step": [1.0, -INF]}, ("train_loss_step", 1)),
    ],
    ids=range(10),
)
def test_what_counts_as_diverged(curves: dict[str, list[float]], found: Any) -> None:
    assert record(**curves).diverged == found


@pytest.mark.parametrize(("since", "found"), [(5, NotFinite("gradients", 5)), (1, None), (None, None), ("2", None)])
def test_gradients_tell_where_no_loss_says_otherwise(since: Any, found: Any) -> None:
    one = record(train__loss=[1.0, 1.0, 1.0])
    one.observations = [
        {"not_finite_since": 2},
        {"summary": "", **({} if since is None else {"not_finite_since": since})},
    ]
    assert one.diverged == found


class Exploding(Project):
    """Model whose weights are not finite from the sixth step on."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * NAN if batch_idx == 5 else loss


@pytest.fixture
def diverged(tmp_path: Path) -> RecordLogger:
    logger = RecordLogger(str(tmp_path), "study", "lr=9")
    run = trainer(NormGrowthMonitor(), logger=logger, max_steps=12, log_every_n_steps=1)
    run.fit(Exploding(), images(96, batch_size=8))
    return logger


def test_a_training_that_diverges(diverged: RecordLogger) -> None:
    found = read_record(diverged.folder)
    assert [math.isfinite(value) for _, value in found.metrics["loss"]] == [True] * 6 + [False] * 6
    assert found.diverged == ("gradients", 5)
    assert str(found.diverged) == "diverged: gradients are not finite from step 5 on"
    del found.observations[:]
    assert found.diverged == ("loss", 6)
    assert str(found.diverged) == "diverged: loss is not finite from step 6 on"


def test_its_end_says_so_and_so_does_its_study(diverged: RecordLogger, tmp_path: Path) -> None:
    folder = RunFolder(diverged.folder)
    assert folder.divergence == ""
    folder.finish(diverged, 1.0)
    ending = json.loads((folder.path / "run.json").read_text())
    assert ending == {"status": "diverged", "seconds": 1.0, "not_finite": {"key": "gradients", "step": 5}}
    assert folder.finished
    assert read_record(folder.path).complete
    index = Index(Study("study", {"lr": [9]}, save_dir=str(tmp_path)))
    assert index.entries[0].status == "finished"
    assert index.entries[0].error == "diverged: gradients are not finite from step 5 on"
    (column,) = [list(c.cells) for c in listing(index).columns if c.header == "status"]
    assert column == ["finished, diverged: gradients are not finite from step 5 on"]


@pytest.mark.parametrize("form", ["html", "md", "tex", "csv"])
def test_reports_of_a_run_that_diverged(form: str) -> None:
    folder = write_run("runs/study/one", steps=range(4, 24, 5))
    logger = RecordLogger("runs", "study", "one")
    known = read_record(folder)
    values = (NAN, INF, -INF)
    for number, step in enumerate((30, 35, 40)):
        logger.log_metrics(dict.fromkeys([*known.metrics, "train/loss"], values[number]), step=step)
        logger.log_layers(
            {key: dict.fromkeys(points[0][1], values[number]) for key, points in known.layers.items()}, step
        )
    logger.finalize("success")
    assert read_record(folder).diverged == ("train/loss", 30)
    text = write_report([folder, write_run("runs/study/two", seed=1)], "report", form).read_text(encoding="utf-8")
    if form in ("html", "md"):
        assert "train/loss is not finite from step 30 on" in text
    if form == "html":
        assert "<strong>Diverged:</strong> seed 0 (train/loss is not finite from step 30 on)." in text
        specs = text[text.index('id="specs"') : text.index("</script>", text.index('id="specs"'))]
        assert not re.search("NaN|Infinity", specs)
    else:
        assert not re.search(r"\b(nan|inf)\b", text)
