"""Sizes of runs before they begin: steps, files and optimizer states from settings of all kinds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from pytorch_lightning import LightningDataModule

from lightning_normgeo import CIFARDataModule, DigitsDataModule, ImageFolderDataModule
from lightning_normgeo.study.definition import Study
from lightning_normgeo.study.disk_needs import DiskNeeds
from lightning_normgeo.study.run_sizes import RunSize, size_of
from lightning_normgeo.study.study_index import Index
from lightning_normgeo.study.validation import Checker

# Lightning's LightningCLI calls what jsonargparse 4.49 renamed
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
CHECKER: list[Checker] = []
MODEL = ["--model.arch=resnet18", "--model.stem=imagenet"]
DIGITS = "--data=lightning_normgeo.DigitsDataModule"
SGD = "--optimizer=torch.optim.SGD"


class Own(LightningDataModule):
    """A user's data module, which says nothing about its size."""


def size(*options: str, data: str = DIGITS, optimizer: str = SGD) -> RunSize:
    CHECKER[:] = CHECKER or [Checker()]
    arguments = ["fit", *MODEL, data, optimizer, "--optimizer.init_args.lr=0.1", *options]
    return size_of(CHECKER[0].parse(arguments), CHECKER[0].meta_model)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_epochs=3"], 60),  # 1,294 images in batches of 64, the last one dropped
        (["--trainer.max_epochs=3", "--trainer.max_steps=50"], 50),
        (["--trainer.max_steps=50"], 50),
        (["--trainer.max_epochs=-1"], None),
        (["--trainer.max_epochs=3", "--trainer.limit_train_batches=0.5"], 30),
        (["--trainer.max_epochs=3", "--trainer.limit_train_batches=7", "--trainer.accumulate_grad_batches=2"], 12),
        (["--trainer.max_epochs=3", "--trainer.devices=2"], 30),
        (["--trainer.max_epochs=3", "--data.batch_size=2000"], 3),
    ],
)
def test_steps(options: list[str], steps: int | None) -> None:
    found = size(*options)
    assert found.steps == steps
    assert (found.measured is None) == (steps is None)
    assert found.record > 1000


def test_steps_of_a_data_module_that_says_nothing() -> None:
    assert size("--trainer.max_epochs=3", data=f"--data={__name__}.Own").steps is None
    assert size("--trainer.max_epochs=3", "--trainer.limit_train_batches=4", data=f"--data={__name__}.Own").steps == 12
    assert size("--trainer.max_epochs=3", data="--data=lightning_normgeo.ImageFolderDataModule").steps is None


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_batches_are_those_of_the_loader(fraction: float, tmp_path: Path) -> None:
    for split, count in (("train", 25), ("test", 1)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4)).save(tmp_path / split / name / f"{number}.png")
    for data in (
        DigitsDataModule(32, val_fraction=fraction),
        ImageFolderDataModule(str(tmp_path), image_size=4, batch_size=3, val_fraction=fraction),
    ):
        known = data.training_batches()
        data.setup("fit")
        assert known == pytest.approx(len(data.train_dataloader()), abs=1)
    assert CIFARDataModule().training_batches() == 45_000 // 128


@pytest.mark.parametrize(
    ("optimizer", "options", "copies"),
    [
        ("torch.optim.SGD", [], 0),
        ("torch.optim.SGD", ["--optimizer.init_args.momentum=0.9"], 1),
        ("torch.optim.AdamW", [], 2),
        ("torch.optim.AdamW", ["--optimizer.init_args.amsgrad=true"], 3),
        ("torch.optim.LBFGS", [], 0),  # needs a closure: unknown
    ],
)
def test_optimizer_states(optimizer: str, options: list[str], copies: int) -> None:
    found = size("--trainer.max_epochs=1", *options, optimizer=f"--optimizer={optimizer}")
    assert found.checkpoint == pytest.approx((1 + copies) * found.weights, rel=0.01)


@pytest.mark.parametrize(
    ("saver", "files"),
    [
        ("{monitor: val/accuracy, save_last: link}", 2),  # and the newest one, to resume from
        ("{monitor: val/accuracy, save_last: true}", 3),
        ("{monitor: val/accuracy, save_last: false}", 1),
        ("{save_top_k: 1}", 1),
        ("{save_top_k: -1}", 4),
        ("{monitor: val/accuracy, save_top_k: 3}", 4),
    ],
)
def test_checkpoint_files(saver: str, files: int) -> None:
    callbacks = f"[{{class_path: pytorch_lightning.callbacks.ModelCheckpoint, init_args: {saver}}}]"
    assert size("--trainer.max_epochs=4", f"--trainer.callbacks={callbacks}").files == files


def sized(option: str, value: Any, **changes: float) -> SimpleNamespace:
    fields = {"steps": 10, "measured": 10, "record": 100.0, "weights": 1e6, "checkpoint": 1e6, "files": 2}
    return SimpleNamespace(option=option, value=value, size=RunSize(**{**fields, **changes}))  # type: ignore[arg-type]


def test_the_whole_study_is_the_sum_of_its_runs() -> None:
    study = Study("s", {"epochs": [1, 2], "momentum": [0, 0.9]})
    cases = [sized("", None), sized("epochs", 2, record=200.0, steps=20), sized("momentum", 0.9, checkpoint=2e6)]
    needs = DiskNeeds(Index(study), cases)
    text = "\n".join(needs.lines())
    assert "measured steps: 10 of 10 to 20 per run. records: about 100 bytes to 200 bytes per run, 600 bytes" in text
    assert "8.0 MB for 4 runs" in text
    assert needs.needed == 600 + 8e6 + 3 * 2e6  # the one that trains has a third file, and its optimizer states
    kept = DiskNeeds(Index(Study("s", study.grid, keep_optimizer_states=True)), cases)
    assert "kept when it has finished; 12.0 MB for 4 runs" in "\n".join(kept.lines())


def test_finished_runs_need_nothing_more() -> None:
    index = Index(Study("s", {"epochs": [1]}))
    index.entries[0].status = "finished"
    assert DiskNeeds(index, [sized("", None)]).needed == 0
    assert DiskNeeds(index, [sized("", None)]).warning == ""
