"""A leading ``~`` is the home folder wherever a path can be given, also in configurations and Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normgeo import ImageFolderDataModule, RecordLogger, evaluate_robustness, read_record
from lightning_normgeo.cli.command import NormgeoCLI
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report import write_report
from lightning_normgeo.robustness import load_decisions
from lightning_normgeo.runs.folders.run_folder import RunFolder
from lightning_normgeo.study.definition import Study
from lightning_normgeo.utilities.files import user_path
from support.tiny_config import TINY_DIGITS


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_records_and_reports(home: Path) -> None:
    logger = RecordLogger("~/runs", version="one")
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.finalize("success")
    assert logger.folder == home / "runs" / "normgeo" / "one"
    assert read_record("~/runs/normgeo/one").metrics == {"train/loss": [(0, 1.0)]}
    assert write_report(["~/runs"], "~/report.md", "md") == home / "report.md"
    assert RunFolder("~/runs/study/one").path == home / "runs" / "study" / "one"
    assert Study("s", {}, save_dir="~/runs").folder == home / "runs" / "s"
    with pytest.raises(ConfigurationError, match=re.escape(f"{home / 'pictures' / 'train'} does not exist")):
        ImageFolderDataModule("~/pictures")
    assert not list(Path().iterdir())


def test_evaluations(home: Path) -> None:
    batches = [(torch.rand(4, 1, 2, 2), torch.arange(4) % 2)]
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    report = evaluate_robustness(network, batches, attacks=[], progress=False, resume_dir="~/journal")
    report.save("~/results")
    assert (home / "results" / "robustness.json").is_file()
    assert load_decisions("~/results").attacks == ["clean"]
    assert not list(Path().iterdir())


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_commands(home: Path) -> None:
    logger = {"class_path": "lightning_normgeo.RecordLogger", "init_args": {"save_dir": "~/runs"}}
    config = {**TINY_DIGITS, "trainer": {**TINY_DIGITS["trainer"], "logger": [logger], "callbacks": []}}
    NormgeoCLI({"subcommand": "validate", "validate": config})
    (record,) = home.glob("runs/normgeo/*/record.jsonl")
    assert "val/loss" in read_record(record).metrics
    assert not list(Path().iterdir())


def test_a_name_that_begins_with_a_tilde_stays() -> None:
    assert user_path("~nobody-of-this-name/runs") == Path("~nobody-of-this-name/runs")
    assert user_path("runs/~") == Path("runs/~")


@pytest.mark.parametrize(
    "need", [user_path, RecordLogger, load_decisions, read_record, ImageFolderDataModule, write_report]
)
def test_an_address_of_remote_storage_is_refused_where_a_folder_is_needed(need: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"s3://bucket/runs is an address\. Give the path of a file or"):
        need("s3://bucket/runs")
    assert not list(Path().iterdir()), "no folder is named after the protocol"


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_loggers_that_write_to_remote_storage_get_its_address_unchanged() -> None:
    logger = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "memory://home/csv"}}
    config = {**TINY_DIGITS, "trainer": {**TINY_DIGITS["trainer"], "logger": [logger], "callbacks": []}}
    cli = NormgeoCLI({"subcommand": "validate", "validate": config})
    assert cli.trainer.logger.save_dir == "memory://home/csv"
    assert not list(Path().glob("memory*"))
