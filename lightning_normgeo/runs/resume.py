"""What ``normgeo fit --run`` adds to a Trainer so that a run goes on as if it had never stopped."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_normgeo.errors import warn_once
from lightning_normgeo.runs.run_folder import NEWEST, remove_checkpoint, waiting


class RandomState(Callback):
    """Keeps the state of the random numbers in checkpoints, so that a run goes on as if it had never stopped.

    Args:
        restore: whether to go on with the state of the checkpoint that fit starts from. Not where that is of another
            run, whose random numbers would take the place of those that the seed stands for.
    """

    _KEY = "random_state"

    def __init__(self, restore: bool) -> None:
        self._restore = restore

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state; as what ``torch.load`` takes for harmless."""
        numbers: Any = np.random.get_state()  # noqa: NPY002 - the state that Lightning seeds
        kind, keys, *rest = numbers
        state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
        if pl_module.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(pl_module.device)
        checkpoint[self._KEY] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with it; tests and validations of a checkpoint do not."""
        state = checkpoint.get(self._KEY)
        if state is None or not self._restore or trainer.state.fn != "fit":
            return
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and pl_module.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), pl_module.device)


class NewestEpoch(ModelCheckpoint):
    """Keeps the newest epoch beside checkpoints that keep the best: their ``save_last`` is the last of the best.

    It is written when the epoch has been validated, and becomes the one to go on from when all that the epoch logs at
    its end is logged: whoever goes on from it logs that no more. Where it cannot be written, as on a full disk, the one
    before stays, and training goes on.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        # a file of its own for every epoch: the one before is needed until the next is whole
        super().__init__(folder / "checkpoints", filename=NEWEST + "{epoch}-{step}", save_top_k=1)
        self._next = ""
        self._folder = folder / "checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a word that the first checkpoint to go on from is waited for."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and not any(self._folder.glob(f"{NEWEST}*.ckpt")):
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._first.touch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the checkpoint of the last epoch be the one to go on from."""
        self._commit(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the checkpoint of the last epoch be the one to go on from."""
        self._commit(trainer)

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._commit(trainer)
        path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, self.best_model_path)
        try:
            self._save_checkpoint(trainer, waiting(path))
        except Exception as error:  # torch has a kind of its own for a full disk
            if self._last_checkpoint_saved != waiting(path):  # else a logger did not like it
                self._give_up(trainer, waiting(path), error)
                return
        self._next = path

    @property
    def _first(self) -> Path:
        return Path(waiting(f"{self._folder / NEWEST}first"))

    def _commit(self, trainer: Trainer) -> None:
        """Put a checkpoint that waits in its place, and remove the one before."""
        path, self._next = self._next, ""
        if not path:
            return
        if trainer.is_global_zero:
            with suppress(OSError):
                os.replace(waiting(path), path)  # noqa: PTH105 - atomic
                self._first.unlink(missing_ok=True)
                if self.best_model_path and self._should_remove_checkpoint(trainer, self.best_model_path, path):
                    remove_checkpoint(Path(self.best_model_path))
        self.best_model_path = path

    def _give_up(self, trainer: Trainer, path: str, error: Exception) -> None:
        if trainer.is_global_zero:
            remove_checkpoint(Path(path))
        kept = f"{Path(self.best_model_path).name} stays" if self.best_model_path else "there is none yet"
        warn_once(
            f"The checkpoint to go on from could not be written ({error}); {kept}. Training goes on.",
            about="checkpoint to go on from",
        )
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other processes wait for this one

    def state_dict(self) -> dict[str, Any]:
        """Leave nothing in checkpoints: Lightning would ask whoever loads one for this callback."""
        return {}


def keeps_the_best(saver: Any) -> bool:
    """Whether a callback keeps the best checkpoints, and was not told to keep no other."""
    return getattr(saver, "monitor", None) is not None and saver.save_last is not False
