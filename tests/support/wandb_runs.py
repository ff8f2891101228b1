"""A small run of the real command line, logged by W&B and by the record side by side."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from lightning_normgeo import read_record
from lightning_normgeo.__main__ import main
from lightning_normgeo.runs.records.record import Record

CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  limit_train_batches: 3
  limit_val_batches: 1
  limit_test_batches: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_normgeo.OrthogonalityMonitor
    - class_path: lightning_normgeo.NormGrowthMonitor
      init_args: {layers: ["*"]}  # so many that they become a table
    - class_path: lightning_normgeo.AffineConvergenceMonitor
    - class_path: lightning_normgeo.RobustnessEvaluation
      init_args: {max_samples: 16, steps: 2, num_images: 2}
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {monitor: val/accuracy, mode: max}
model: {arch: resnet18, stem: imagenet}
data:
  class_path: lightning_normgeo.DigitsDataModule
  init_args: {batch_size: 8}
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.05, weight_decay: 0.001}
"""
# Lightning's LightningCLI calls what jsonargparse 4.49 renamed
lightning_cli = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def fit(folder: Path, mode: str) -> Record:
    """Run ``normgeo fit`` in a folder and return its record, once W&B has written or sent everything.

    Args:
        folder: to run in; results go to ``runs``.
        mode: of W&B.
    """
    import wandb

    (folder / "small.yaml").write_text(CONFIG, encoding="utf-8")
    with redirect_stdout(StringIO()):
        main(["fit", "--config", str(folder / "small.yaml"), "--wandb", mode, "--report", "false"])
    wandb.teardown()
    (path,) = (folder / "runs").rglob("record.jsonl")
    return read_record(path)
