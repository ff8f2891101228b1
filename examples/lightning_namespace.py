"""The ``lightning`` namespace, AdamW, and the growth of ‖W‖² explained over a whole run.

A small network with layer normalization learns scikit-learn's digits. Under AdamW the squared norm changes for several
reasons, so the prediction of eq 16 does not apply. ``NormGrowthMonitor(cumulative=True)`` sums the exact terms over
every step, measured or not. Some aggregates are metrics of the Trainer, so that ``ModelCheckpoint`` can monitor them:
here it keeps the weights of the epoch at whose end the scale-invariant weights turned by the smallest angle.

Prints which weights are scale invariant, ‖W_T‖² - ‖W_0‖², the four terms that explain it with their sum, and the file
of the checkpoint.
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import NormGrowthMonitor, RecordLogger, read_record, scale_invariant_units


class Classifier(L.LightningModule):
    """A module of your own; nothing in it refers to lightning_normgeo."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(64, 128, bias=False), nn.Linear(128, 128, bias=False)
        hidden = (first, nn.LayerNorm(128), nn.ReLU(), second, nn.LayerNorm(128), nn.ReLU())
        self.network = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)


L.seed_everything(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)
loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64, shuffle=True)

record = RecordLogger("runs")
checkpoint = ModelCheckpoint(monitor="norm_growth/angular_update", mode="min")
callbacks = [NormGrowthMonitor(cumulative=True), checkpoint]
trainer = L.Trainer(max_epochs=5, devices=1, logger=[record], callbacks=callbacks, log_every_n_steps=5)
model = Classifier()
print(scale_invariant_units(model.network, images[:8]))
trainer.fit(model, loader)

metrics = read_record(record.folder).metrics
for name in ("increment", "term_gradient", "term_momentum", "term_weight_decay", "term_quadratic", "explained"):
    step, value = metrics[f"norm_growth/cumulative_{name}"][-1]
    print(f"cumulative_{name} at step {step}: {value:.6f}")
print(f"eq 16 applies: {bool(metrics['norm_growth/eq16_applies'][-1][1])}")
print(f"checkpoint: {checkpoint.best_model_path}")
