"""A project with a ``LightningCLI`` of its own; a second YAML file adds the callbacks, without a change in Python.

``config.yaml`` is the project as it was. ``normgeo.yaml`` adds the callbacks to those of the project, and a record to
its loggers. Without arguments the script does the same as this command, in any folder::

    python train.py fit --config config.yaml --config normgeo.yaml

The model is then tested. Prints the callbacks of the Trainer, and the summary of the run if it has a record.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo import DigitsDataModule, RecordLogger, summarize


class Classifier(LightningModule):
    """A module of your own; nothing in it refers to lightning_normgeo."""

    def __init__(self, width: int = 16, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        hidden = nn.Sequential(nn.Conv2d(3, width, 4, stride=4, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.network = nn.Sequential(hidden, nn.Flatten(), nn.Linear(64 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


if __name__ == "__main__":
    here = Path(__file__).parent
    default = ["fit", "--config", str(here / "config.yaml"), "--config", str(here / "normgeo.yaml")]
    cli = LightningCLI(Classifier, DigitsDataModule, args=sys.argv[1:] or default)
    cli.trainer.test(cli.model, datamodule=cli.datamodule)
    print("callbacks:", ", ".join(type(callback).__name__ for callback in cli.trainer.callbacks))
    for logger in cli.trainer.loggers:
        if isinstance(logger, RecordLogger):  # only with normgeo.yaml
            print(summarize(logger.folder))
