"""``lightning.pytorch`` and ``pytorch_lightning``: the callbacks serve the Trainers of both, in every import order."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
for name in sys.argv[1].split(","):
    __import__(name)
import lightning.pytorch, pytorch_lightning
import torch
from torch import nn
import lightning_normgeo as ng

monitors = [ng.OrthogonalityMonitor, ng.NormGrowthMonitor, ng.AffineConvergenceMonitor, ng.RobustnessEvaluation]
quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
             enable_model_summary=False, log_every_n_steps=1, max_steps=2)
torch.set_num_threads(1)
for pl in (lightning.pytorch, pytorch_lightning):
    class Project(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
        def forward(self, x):
            return self.net(x)
        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])
        def test_step(self, batch, index):
            pass
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)
    data = torch.utils.data.TensorDataset(torch.rand(8, 3, 8, 8), torch.randint(3, (8,)))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    trainer = pl.Trainer(callbacks=[monitor() for monitor in monitors], **quiet)
    model = Project()
    trainer.fit(model, loader)
    assert trainer.callback_metrics["norm_growth/increment"] > 0
    assert trainer.callback_metrics["affine/abs_beta_minus_mu_mean"] > 0
    assert trainer.test(model, loader, verbose=False)[0]["robustness/bim/n"] == 8
print("both")
"""


@pytest.mark.parametrize(
    "order",
    [
        "lightning.pytorch",
        "pytorch_lightning",
        "lightning.pytorch,pytorch_lightning",
        "lightning_normgeo.callbacks",
        "lightning.pytorch,lightning_normgeo.callbacks",
        "pytorch_lightning,lightning_normgeo.callbacks",
    ],
)
def test_both_trainers(order: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, order]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.stdout.strip().endswith("both"), done.stderr[-2000:]
