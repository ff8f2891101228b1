"""A hydra application: callbacks, logger and the normalization come from its configuration.

``swap_norm`` replaces the batch normalization of the network by the one that ``norm`` names, and the record is written
to the folder that hydra gives the job. It works in any folder, with hydra's overrides and sweeps::

    python train.py norm=gn trainer.max_epochs=3
    python train.py --multirun norm=bn,gn,ln

Prints for each job the changes by ``swap_norm``, the number of weights with each kind of scale-invariant unit, the
largest |cos(W, ∇W)| of the last measured step, and the accuracy on clean and on attacked images.
"""

from __future__ import annotations

import hydra
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo import scale_invariant_units, swap_norm


class Classifier(pl.LightningModule):
    """A module of your own around a network with batch normalization."""

    def __init__(self, lr: float, width: int) -> None:
        super().__init__()
        self.lr = lr
        hidden = nn.Sequential(nn.Conv2d(3, width, 4, stride=4, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.network = nn.Sequential(hidden, nn.Flatten(), nn.Linear(64 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@hydra.main(config_path=".", config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    """Train and test one job."""
    pl.seed_everything(config.seed)
    model, data = instantiate(config.model), instantiate(config.data)
    examples = torch.rand(8, 3, 32, 32)
    if config.norm != "bn":
        print(swap_norm(model.network, config.norm, example_batch=examples))
    kinds = scale_invariant_units(model.network, examples).kinds
    callbacks = list(instantiate(config.callbacks).values())
    trainer = instantiate(config.trainer, logger=instantiate(config.logger), callbacks=callbacks)
    trainer.fit(model, datamodule=data)
    cosine = trainer.callback_metrics["orthogonality/max_abs_cos"]
    trainer.test(model, datamodule=data)
    clean, bim = (trainer.callback_metrics[f"robustness/{name}/accuracy"] for name in ("clean", "bim"))
    print(f"norm={config.norm}: {kinds}, max |cos| {cosine:.1e}, accuracy {clean:.3f} clean, {bim:.3f} under BIM")


if __name__ == "__main__":
    main()
