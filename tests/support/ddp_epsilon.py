"""Script of tests/callbacks/readings/test_epsilon_part.py: the ε part in two processes, averaged over both."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from lightning_normgeo import OrthogonalityMonitor  # noqa: E402
from support.processes import leave_group  # noqa: E402
from support.projects import ConvNet, Project, images, sgd, trainer  # noqa: E402


class Watched(pl.Callback):
    """Records the monitored aggregates of each step, on every rank."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {"corrected": [], "raw": []}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = trainer.callback_metrics
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.seen["corrected"].append(float(metrics["orthogonality/max_abs_cos_corrected"]))
            self.seen["raw"].append(float(metrics["orthogonality/max_abs_cos"]))


def main(folder: str, batches: int) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(0)
    project, watched = Project(sgd(momentum=0.9), ConvNet(eps=1e-3)).double(), Watched()
    run = trainer(
        OrthogonalityMonitor(),
        watched,
        steps=4,
        strategy="ddp",
        devices=2,
        accumulate_grad_batches=batches,
    )
    run.fit(project, images(64, batch_size=4, dtype=torch.float64))
    Path(folder, f"rank{run.global_rank}.json").write_text(json.dumps(watched.seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    leave_group()
