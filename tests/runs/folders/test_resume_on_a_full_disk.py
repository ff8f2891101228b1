"""The checkpoint to resume from: if it cannot be written, the previous one stays, and training continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_normgeo import NormGrowthMonitor
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.runs.folders.resume import NewestEpoch
from lightning_normgeo.runs.folders.run_folder import RunFolder
from support.projects import Project, Rows, images, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


class Full:
    """A strategy whose writing fails in some epochs after half a file."""

    def __init__(self, epochs: set[int], error: Exception) -> None:
        self.epochs, self.error = epochs, error
        self.saved = torch.save

    def __call__(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if checkpoint["epoch"] in self.epochs:
            Path(path).write_bytes(b"PK half")
            raise self.error
        self.saved(checkpoint, path)


@pytest.mark.parametrize("epochs", [{0}, {1}, {2}, {0, 1, 2}], ids=str)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_the_one_before_stays(epochs: set[int], error: Exception, tmp_path: Path) -> None:
    folder = tmp_path / "study" / "one"
    run = trainer(NewestEpoch(folder), max_steps=-1, max_epochs=3, enable_checkpointing=True, limit_train_batches=2)
    run.strategy.checkpoint_io.save_checkpoint = Full(epochs, error)
    with pytest.warns(MeasurementWarning, match="checkpoint to resume from could not be written .*Training goes on"):
        run.fit(Project(), images(16, batch_size=8))
    assert run.current_epoch == 3
    newest = max({0, 1, 2} - epochs, default=None)
    names = [path.name for path in folder.glob("checkpoints/*")]
    assert names == (["resume-first.next"] if newest is None else [f"resume-epoch={newest}-step={2 * newest + 2}.ckpt"])
    assert (RunFolder(folder).checkpoint is None) == (newest is None)


def test_a_run_goes_on_from_what_is_logged_to_its_end(tmp_path: Path) -> None:
    """Lightning logs the average of an epoch after all its end hooks, and a resumed run does not log it again."""
    folder, seen = RunFolder(tmp_path / "study" / "one"), []

    class Watching(Project):
        def name(self) -> str | None:
            return folder.checkpoint and Path(folder.checkpoint).name

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self(batch[0]).sum())

        def on_train_epoch_end(self) -> None:
            seen.append(("ends", self.name()))

        def on_train_epoch_start(self) -> None:
            seen.append(("starts", self.name()))

    best = ModelCheckpoint(folder.path / "checkpoints", monitor="val_loss", save_on_train_epoch_end=False)
    settings = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": True, "limit_train_batches": 2}
    trainer(best, NewestEpoch(folder.path), **settings).fit(Watching(), images(16, batch_size=8), images(8))
    first, second = "resume-epoch=0-step=2.ckpt", "resume-epoch=1-step=4.ckpt"
    assert seen == [("starts", None), ("ends", None), ("starts", first), ("ends", first)]
    assert Path(folder.checkpoint or "").name == second
    assert not list(folder.path.glob("checkpoints/*.next"))


def test_a_logger_that_fails_is_told_of_once_a_training() -> None:
    class Failing(Rows):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if any(key.startswith("norm_growth") for key in metrics):
                raise RuntimeError(f"gone at step {step}")

        def log_observation(self, values: Any) -> None:
            raise RuntimeError("gone")

    for _ in range(2):
        run = trainer(NormGrowthMonitor(), logger=Failing(), max_steps=6)
        with pytest.warns(MeasurementWarning) as said:
            run.fit(Project(), images(48, batch_size=8))
        told = [str(one.message) for one in said if "failed to log" in str(one.message)]
        assert len(told) == 1, told
        assert "gone at step 0" in told[0]
