"""A run has one folder, whichever process claims its name first: the user's, a forked one, or a spawned one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_normgeo import RecordLogger, read_record

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
FIT_AND_VALIDATE = """
from pytorch_lightning import LightningModule, Trainer
from torch import nn
import torch
from lightning_normgeo import RecordLogger, read_record

class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
    def training_step(self, batch, index):
        loss = self.layer(batch).mean()
        self.log("train/loss", loss)
        return loss
    def validation_step(self, batch, index):
        self.log("val/loss", self.layer(batch).mean(), sync_dist=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

if __name__ == "__main__":
    record = RecordLogger("runs")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    forked = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}
    trainer = Trainer(logger=record, max_epochs=2, log_every_n_steps=1, num_sanity_val_steps=0, **forked, **quiet)
    model, data = Line(), torch.utils.data.DataLoader(torch.rand(8, 1), 2)
    trainer.fit(model, data, data)
    trainer.validate(model, data, verbose=False)
    curves = read_record(record.folder).metrics
    assert [step for step, _ in curves["train/loss"]] == [0, 1, 2, 3], curves
    assert [step for step, _ in curves["val/loss"]] == [1, 3], curves
    assert [path.name for path in record.folder.parent.iterdir()] == [record.version]
"""


@forks
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_the_name_that_a_forked_process_claims_is_that_of_the_run(tmp_path: Path) -> None:
    logger = RecordLogger(str(tmp_path))
    child = os.fork()
    if child == 0:
        logger.log_metrics({"loss": 1.0}, 0)
        os._exit(0)
    os.waitpid(child, 0)
    logger.log_metrics({"loss": 0.5}, 1)
    assert [path.name for path in logger.folder.parent.iterdir()] == [logger.version]
    assert read_record(logger.folder).metrics == {"loss": [(0, 1.0), (1, 0.5)]}


def test_a_copy_writes_to_the_same_run(tmp_path: Path) -> None:
    logger = RecordLogger(str(tmp_path))
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"loss": 1.0}, 0)
    assert copy.folder == logger.folder
    assert read_record(logger.folder).metrics == {"loss": [(0, 1.0)]}


def test_two_loggers_are_two_runs(tmp_path: Path) -> None:
    folders = {RecordLogger(str(tmp_path)).folder for _ in range(3)}
    assert len(folders) == 3


@pytest.mark.slow
@forks
def test_a_fit_and_an_evaluation_in_forked_processes_have_one_record(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(FIT_AND_VALIDATE)
    done = subprocess.run([sys.executable, str(script)], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
