"""Script of tests/normalization/surgery/test_swap_architectures.py: swapped models trained on two processes."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import swap_norm
from support.processes import leave_group
from support.projects import Project, images, sgd, trainer


class Meddler(pl.Callback):
    """A callback that tries to swap during training."""

    def __init__(self) -> None:
        self.message = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            try:
                swap_norm(pl_module, "ln")
            except ConfigurationError as error:
                self.message = str(error)


def swapped_and_trained(to: str, devices: int) -> dict[str, Any]:
    """Train for three steps on batches of eight, distributed over the processes, and return the final weights."""
    pl.seed_everything(0, verbose=False)
    project, meddler = Project(sgd(momentum=0.9)), Meddler()
    swap_norm(project, to)
    before = [parameter.detach().clone() for parameter in project.parameters()]
    data = images(32).dataset
    dealt = DistributedSampler(data, devices, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    spread = {"strategy": "ddp", "devices": devices, "use_distributed_sampler": False} if devices > 1 else {}
    run = trainer(meddler, steps=3, **spread)
    run.fit(project, DataLoader(data, batch_size=8 // devices, sampler=dealt))
    after = dict(project.named_parameters())
    changed = [name for (name, new), old in zip(after.items(), before, strict=True) if not torch.equal(old, new)]
    return {
        "weights": {name: parameter.tolist() for name, parameter in after.items()},
        "changed": len(changed) == len(after),
        "refused": meddler.message,
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report = {to: swapped_and_trained(to, devices=2) for to in ("gn", "wn")}
    Path(folder, f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
    leave_group()
