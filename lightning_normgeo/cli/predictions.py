"""Predictions of ``normgeo predict``, written to the folder of the run."""

from __future__ import annotations

from pathlib import Path

import torch
from pytorch_lightning import Trainer


def save_predictions(trainer: Trainer, folder: Path | None) -> Path | None:
    """Save what ``Trainer.predict`` returns: the output of ``predict_step`` for each batch, in a list.

    Args:
        trainer: after ``predict``.
        folder: Folder of the run on rank zero; None for the Trainer's ``default_root_dir``.

    Returns:
        The path of ``predictions.pt``; with several processes that of ``predictions_RANK.pt``, since each process has
        seen other samples. None where there are no predictions to keep.
    """
    predictions = trainer.predict_loop.predictions
    if trainer.fast_dev_run or not predictions:  # type: ignore[attr-defined]
        return None
    place = Path(trainer.strategy.broadcast(str(folder or trainer.default_root_dir)))
    place.mkdir(parents=True, exist_ok=True)
    path = place / ("predictions.pt" if trainer.world_size == 1 else f"predictions_{trainer.global_rank}.pt")
    torch.save(predictions, path)
    return path
