"""The resolved configuration of a run, for its folder and its loggers."""

from __future__ import annotations

from typing import Any

import yaml
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.runs.records.record_logger import RecordLogger


class RecordConfig(SaveConfigCallback):
    """Saves the resolved configuration into the run's own folder and sends it to every logger."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration; called on rank zero only."""
        text = self.parser.dump(_without_place(self.config), skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, RecordLogger):
                logger.log_file("config.yaml", text.encode())
                logger.log_hyperparams({"wandb": {"id": _wandb_id(trainer)}})
            logger.log_hyperparams({"config": yaml.safe_load(text)})


def _without_place(config: Any) -> Any:
    """Return a configuration without the run's own folder, names and ids, so that another run can start from it."""
    config = config.clone()
    config["run"] = None
    loggers = config.trainer.logger
    entries = [
        logger for logger in (loggers if isinstance(loggers, list) else [loggers]) if hasattr(logger, "init_args")
    ]
    places = {entry.init_args.get("version") for entry in entries} - {None}
    for entry in entries:
        for name in ("version", "id"):
            if name in entry.init_args:
                entry.init_args[name] = None
        if entry.init_args.get("name") in places:  # W&B's run was named after the folder
            entry.init_args["name"] = None
    return config


def _wandb_id(trainer: Trainer) -> str | None:
    """Return W&B's id of the run; None without a W&B logger."""
    ids = [str(logger.version) for logger in trainer.loggers if is_wandb(logger)]
    return ids[0] if ids else None
