"""The title of a run names its network, normalization, data and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_normgeo import NormGrowthMonitor, RecordLogger, read_record
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.run_title import run_title
from support.projects import Project, images, sgd, trainer

OPTIMIZER = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.0, "weight_decay": 5e-4}}
DATA = {"class_path": "lightning_normgeo.CIFARDataModule", "init_args": {"name": "cifar10"}}


def title(settings: dict[str, Any], **values: Any) -> str:
    return run_title(Record(Path("run"), settings=settings, **values))


def test_a_run_of_the_command_line() -> None:
    settings = {"arch": "resnet101", "norm": "bn", "optimizer": OPTIMIZER, "config": {"data": DATA}}
    assert title(settings) == "ResNet-101 · bn · CIFAR-10 · SGD lr 0.05, wd 0.0005"
    digits = {"class_path": "lightning_normgeo.DigitsDataModule", "init_args": {}}
    assert title({"config": {"data": digits}}) == "Digits"


def test_a_run_of_another_project(tmp_path: Path) -> None:
    record = RecordLogger(tmp_path)
    trainer(NormGrowthMonitor(), steps=2, logger=record).fit(Project(sgd(momentum=0.9)), images())
    assert run_title(read_record(record.folder)) == "ConvNet · SGD lr 0.1, momentum 0.9"


class Own(Dataset[Any]):
    """A data set that calls itself its own."""

    def __init__(self) -> None:
        self.dataset = self

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3, 8, 8), index % 4


class Broken(Own):
    """A data set whose attributes cannot be asked for, as while a server is away."""

    def __getattribute__(self, name: str) -> Any:
        if name == "dataset":
            raise RuntimeError("away")
        return super().__getattribute__(name)


@pytest.mark.filterwarnings("ignore:A measurement failed")
@pytest.mark.parametrize(("data", "named"), [(Own, "ConvNet · Own"), (Broken, "")])
def test_any_data_set_is_named_or_left_out(data: type[Own], named: str, tmp_path: Path) -> None:
    record = RecordLogger(tmp_path)
    subset = Subset(data(), range(8))
    trainer(NormGrowthMonitor(), steps=2, logger=record).fit(Project(), DataLoader(subset, batch_size=4))
    found = read_record(record.folder)
    assert run_title(found) == " · ".join(filter(None, [named, "SGD lr 0.1"]))
    assert found.observations[-1]["left_out"] == {}


def test_a_schedule_does_not_change_the_title() -> None:
    settings = {"lr": 0.0, "initial_lr": 0.1}
    assert title({}, observations=[{"optimizers": [{"class": "Adam", "settings": settings}]}]) == "Adam lr 0.1"


@pytest.mark.parametrize("junk", [None, 3, "text", [1], {"class_path": 3}, {"init_args": "x"}])
def test_any_settings_have_a_title(junk: Any) -> None:
    settings = {"arch": junk, "norm": junk, "optimizer": junk, "config": {"data": junk}}
    assert isinstance(title(settings, observations=[{"optimizers": [junk], "network": junk, "data": junk}]), str)
    assert isinstance(title({"config": junk}, observations=[{"optimizers": junk}]), str)


def test_a_long_title_is_cut() -> None:
    assert len(title({"norm": "x" * 500})) == 100
