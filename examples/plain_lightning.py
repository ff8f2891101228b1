"""Four callbacks in a plain project with ``pytorch_lightning``.

A small convolutional network with batch normalization learns scikit-learn's digits under plain SGD, and is then tested.
The two convolutions are scale invariant; the last layer is not, and serves as a control.

Prints, for the last measured step, the largest |cos(W, ∇W)| of the scale-invariant weights, which is near zero, and of
the control, which is not, and the increment of ‖W‖² beside η²‖∇W‖², the prediction of eq 16; then the accuracy on clean
and on attacked images, and the folder of the record.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_normgeo as ng


class Classifier(pl.LightningModule):
    """A module of your own; nothing in it refers to lightning_normgeo."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.network = nn.Sequential(first, second, nn.Flatten(), nn.Linear(32 * 16, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


pl.seed_everything(0)
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)  # in [0, 1]
train, test = random_split(TensorDataset(images, torch.tensor(labels)), [0.8, 0.2])

record = ng.RecordLogger("runs")  # beside the loggers you have
monitors = [ng.OrthogonalityMonitor(), ng.NormGrowthMonitor(), ng.AffineConvergenceMonitor()]
callbacks = [*monitors, ng.RobustnessEvaluation()]
trainer = pl.Trainer(max_epochs=5, devices=1, logger=[record], callbacks=callbacks, log_every_n_steps=10)
model = Classifier()
trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
geometry = dict(trainer.callback_metrics)
trainer.test(model, DataLoader(test, batch_size=64))
attacked = dict(trainer.callback_metrics)

cosine, control = (geometry[f"{group}/max_abs_cos"] for group in ("orthogonality", "orthogonality_control"))
print(f"max |cos|: {cosine:.1e} scale invariant, {control:.1e} control")
increment, predicted = (geometry[f"norm_growth/{name}"] for name in ("increment", "predicted"))
print(f"increment of ‖W‖²: {increment:.3e} measured, {predicted:.3e} predicted by eq 16")
clean, bim = (attacked[f"robustness/{name}/accuracy"] for name in ("clean", "bim"))
print(f"accuracy: {clean:.3f} clean, {bim:.3f} under BIM")
print(f"record: {record.folder}")
