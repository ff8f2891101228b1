"""Callbacks of ``normgeo fit --run`` with which a resumed run continues as if it had never stopped."""

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
from lightning_normgeo.runs.folders.run_folder import CHECKPOINTS, NEWEST, remove_checkpoint, waiting


class RandomState(Callback):
    """Saves the states of the random number generators in checkpoints, and restores them when a run resumes.

    Args:
        restore: Whether to restore the states from the checkpoint that ``fit`` starts from. False for a checkpoint of
            another run: its random numbers would replace those that the seed of this run determines.
    """

    _KEY = "random_state"

    def __init__(self, restore: bool) -> None:
        self._restore = restore

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states, in types that ``torch.load`` accepts with ``weights_only=True``."""
        numbers: Any = np.random.get_state()  # noqa: NPY002 - the generator that Lightning seeds
        kind, keys, *rest = numbers
        state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
        if pl_module.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(pl_module.device)
        checkpoint[self._KEY] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the states in ``fit``, not when a checkpoint is only tested or validated."""
        state = checkpoint.get(self._KEY)
        if state is None or not self._restore or trainer.state.fn != "fit":
            return
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and pl_module.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), pl_module.device)


class NewestEpoch(ModelCheckpoint):
    """Keeps a checkpoint of the newest epoch beside callbacks that keep the best ones.

    It is needed because their ``save_last`` is the last one that was among the best, perhaps many epochs ago.

    The checkpoint is written under a temporary name when the epoch has been validated. It is renamed, and thereby
    becomes the one to resume from, when everything that the epoch logs at its end has been logged: a run that resumes
    from it does not log that again. If it cannot be written, as on a full disk, the previous one stays and training
    continues.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        # one file for each epoch: the previous one is needed until the next is complete
        super().__init__(folder / CHECKPOINTS, filename=NEWEST + "{epoch}-{step}", save_top_k=1)
        self._next = ""
        self._folder = folder / CHECKPOINTS

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create a marker file until the first checkpoint is complete; see :attr:`RunFolder.checkpoint`."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and not any(self._folder.glob(f"{NEWEST}*.ckpt")):
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._first.touch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the checkpoint of the previous epoch the one to resume from."""
        self._commit(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the checkpoint of the last epoch the one to resume from."""
        self._commit(trainer)

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._commit(trainer)
        path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, self.best_model_path)
        try:
            self._save_checkpoint(trainer, waiting(path))
        except Exception as error:  # torch raises a RuntimeError for a full disk
            if self._last_checkpoint_saved != waiting(path):  # else the file is written, and a logger failed after that
                self._give_up(trainer, waiting(path), error)
                return
        self._next = path

    @property
    def _first(self) -> Path:
        """The marker file that says that there is no complete checkpoint yet."""
        return Path(waiting(f"{self._folder / NEWEST}first"))

    def _commit(self, trainer: Trainer) -> None:
        """Rename the checkpoint with the temporary name, if there is one, and remove the previous one."""
        path = self._next
        self._next = ""
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
        """Warn that a checkpoint could not be written, and keep the previous one."""
        if trainer.is_global_zero:
            remove_checkpoint(Path(path))
        kept = f"{Path(self.best_model_path).name} stays" if self.best_model_path else "there is none yet"
        warn_once(
            f"The checkpoint to resume from could not be written ({error}); {kept}. Training goes on.",
            about="checkpoint to resume from",
        )
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait for this one

    def state_dict(self) -> dict[str, Any]:
        """Save no state: Lightning would warn whoever loads the checkpoint without this callback."""
        return {}


def keeps_the_best(saver: Any) -> bool:
    """Whether a checkpoint callback keeps the best checkpoints, and ``save_last`` was not set to False."""
    return getattr(saver, "monitor", None) is not None and saver.save_last is not False


def best_checkpoint(trainer: Trainer) -> str | None:
    """Return the path of the best checkpoint, or None to test the current weights."""
    best: str = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best and not Path(best).exists():  # left behind by a run that was resumed in another folder
        warn_once(f"The best checkpoint {best} is gone; the last weights are tested instead.")
        return None
    return best or None
