"""Script of tests/callbacks/channels/test_channel_evaluation.py: evaluation of channels on any number of processes."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from lightning_normgeo import ChannelEvaluation, RecordLogger  # noqa: E402
from support.processes import leave_group  # noqa: E402
from support.projects import Project, images, trainer  # noqa: E402
from support.small_models import worn  # noqa: E402

COUNT = 31
RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Fragile(TensorDataset):
    """Data that one process cannot read."""

    def __getitem__(self, index: int) -> Any:
        if RANK == 1:
            raise OSError("the disk of one process")
        return super().__getitem__(index)


class WithTestData(Project):
    def __init__(self, kind: type[TensorDataset]) -> None:
        super().__init__()
        self.kind = kind

    def test_dataloader(self) -> Any:
        return DataLoader(self.kind(*images(COUNT).dataset.tensors), 4)


def main(folder: str, devices: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    project = WithTestData(TensorDataset)
    worn(project)
    spread: dict[str, Any] = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    callback = ChannelEvaluation(criteria=["gamma", "product", "share", "random", "pairs"], ratios=[0.2, 0.5])
    run = trainer(callback, logger=RecordLogger(folder, version="run"), default_root_dir=folder, **spread)
    (logged,) = run.test(project, verbose=False)
    report: dict[str, Any] = {"logged": logged, "results": callback.report.rows(), "clean": callback.report.clean.n}
    report["masks"] = {
        f"{criterion}/{ratio:g}": {name: mask.tolist() for name, mask in masks.items()}
        for (criterion, ratio), masks in callback.report.masks.items()
    }
    for name, kind in (("after fit", TensorDataset), ("fragile", Fragile)):
        torch.manual_seed(1)
        after = ChannelEvaluation(criteria=["gamma"], ratios=0.5, after_fit=True)
        trainer(after, steps=1, default_root_dir=folder, **spread).fit(WithTestData(kind), images(16))
        assert after.report is not None
        report[name] = after.report.not_evaluated or after.report.clean.n
    Path(folder, f"rank{run.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    leave_group()
