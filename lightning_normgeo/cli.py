"""The command line: ``normgeo fit | validate | test | predict``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import yaml
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.console import Console
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lightning_normgeo.callbacks
import lightning_normgeo.data  # noqa: F401 - so that short class names work in configurations
from lightning_normgeo._version import __version__
from lightning_normgeo.errors import ConfigurationError, one_line_errors, warn_once
from lightning_normgeo.models.resnet import ResNetClassifier
from lightning_normgeo.record import read_record
from lightning_normgeo.record_logger import RecordLogger, check_writable
from lightning_normgeo.report.command import write_quietly
from lightning_normgeo.resume import NewestEpoch, RandomState, keeps_the_best
from lightning_normgeo.run_folder import RunFolder
from lightning_normgeo.summary import summary_table

_DESCRIPTION = """Train ResNets with any normalization and measure its geometry. Besides the commands below:
normgeo study runs a grid of trainings, normgeo report makes a report of any runs."""


def configs_folder() -> Path:
    """Return the folder of the configurations that come with the package."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


class RecordConfig(SaveConfigCallback):
    """Saves the resolved configuration into the run's own folder and sends it to every logger."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration; called on rank zero only."""
        text = self.parser.dump(_unplaced(self.config), skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, RecordLogger):
                logger.log_file("config.yaml", text.encode())
                logger.log_hyperparams({"wandb": {"id": _wandb_id(trainer)}})
            logger.log_hyperparams({"config": yaml.safe_load(text)})


class NormgeoCLI(LightningCLI):
    """LightningCLI with the package's defaults; ``fit`` ends with the test loop on the best weights and a report."""

    run_folder: RunFolder | None = None

    def __init__(self, args: list[str] | dict[str, Any] | None = None) -> None:
        defaults = {"default_config_files": [str(configs_folder() / "defaults.yaml")]}
        try:
            super().__init__(
                ResNetClassifier,
                LightningDataModule,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=RecordConfig,
                save_config_kwargs={"save_to_log_dir": False},
                auto_configure_optimizers=False,
                parser_kwargs={
                    "description": _DESCRIPTION,
                    "version": __version__,
                    **{name: dict(defaults) for name in self.subcommands()},
                },
                args=args,
            )
        finally:  # the whole command has run, or failed
            if self.run_folder is not None:
                self.run_folder.release()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the optimizer blocks, links between data and model, and what happens after fit."""
        for base, key, skip in ((Optimizer, "optimizer", "params"), (LRScheduler, "lr_scheduler", "optimizer")):
            # as text for the model, which splits the parameters by what is decayed before it builds the optimizer
            parser.add_subclass_arguments(base, key, instantiate=False, required=False, fail_untyped=False, skip={skip})
            parser.link_arguments(key, f"model.{key}", compute_fn=_as_dict)
        parser.link_arguments("data", "model.num_classes", compute_fn=_num_classes, apply_on="instantiate")
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Folder of a fit, <folder>/<study>/<name>. The same command again goes on from the last checkpoint. "
            "If left out: a new folder, by the time it starts.",
        )
        parser.add_argument(
            "--wandb",
            type=Literal["offline", "online", "disabled"] | None,
            default=None,
            help="W&B mode; the environment's WANDB_MODE if left out, else offline: nothing leaves the machine.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=True,
            help="After fit, run the test loop (with RobustnessEvaluation) on the best checkpoint.",
        )
        parser.add_argument(
            "--report", type=bool, default=True, help="Write report.html into the run's folder at the end."
        )

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as given; Lightning would put the checkpoint's settings over it without a word.

        Where the two do not fit, :meth:`ResNetClassifier.on_load_checkpoint` says so.
        """

    def before_instantiate_classes(self) -> None:
        """Choose W&B's mode, and keep its staging files beside the run."""
        os.environ["WANDB_MODE"] = self._get(self.config, "wandb") or os.environ.get("WANDB_MODE") or "offline"
        os.environ.setdefault("WANDB_SILENT", "true")
        self._take_folder()
        for kind, settings in self._entries("logger"):
            save_dir = settings.get("save_dir")
            if kind == "RecordLogger" and save_dir:  # here, as jsonargparse would bury the error of a list's entry
                check_writable(save_dir, settings.get("name", ""))
            if kind == "WandbLogger" and save_dir:
                os.environ.setdefault("WANDB_DATA_DIR", str(Path(save_dir).absolute() / "wandb-data"))

    def _entries(self, kind: str) -> list[tuple[str, Any]]:
        """Return the class names and settings of the loggers or callbacks to be built."""
        found = self._get(self.config, "trainer").get(kind)
        entries = found if isinstance(found, list) else [found]
        known = [entry for entry in entries if hasattr(entry, "get")]
        return [(entry.get("class_path", "").rpartition(".")[2], entry.get("init_args", {})) for entry in known]

    def _take_folder(self) -> None:
        """Send the run where ``--run`` says."""
        given = self._get(self.config, "run")
        if given is None:
            return
        if self.subcommand != "fit":
            raise ConfigurationError(f"--run is for fit. Leave it out: {self.subcommand} gets a folder of its own.")
        if self._get(self.config, "trainer").get("fast_dev_run"):
            raise ConfigurationError(f"--run {given} with trainer.fast_dev_run, which writes nothing. Leave one out.")
        folder = RunFolder(given)
        folder.claim()
        self.run_folder = folder
        if folder.finished:
            raise ConfigurationError(f"--run {given} has finished. Choose another folder, or remove this one.")
        folder.direct(self._entries("logger"))
        trainer = self.config[self.subcommand].trainer
        trainer.default_root_dir = trainer.default_root_dir or given

    def before_fit(self) -> None:
        """Go on where the run was; its own checkpoint is newer than one it was told to start from."""
        if self.run_folder is None:
            return
        own, settings = self.run_folder.checkpoint, self.config_init["fit"]
        settings["ckpt_path"] = own or settings.get("ckpt_path")
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, RandomState(restore=own is not None))
        savers = self.trainer.checkpoint_callbacks
        if savers and all(map(keeps_the_best, savers)):
            callbacks.append(NewestEpoch(self.run_folder.path))

    def after_instantiate_classes(self) -> None:
        """Leave out a W&B logger that cannot start."""
        self._began = time.monotonic()
        for logger in [logger for logger in self.trainer.loggers if type(logger).__name__ == "WandbLogger"]:
            try:
                Path(logger.save_dir or ".").mkdir(parents=True, exist_ok=True)
                _ = logger.experiment  # type: ignore[attr-defined]
            except Exception as error:
                warn_once(
                    f"W&B could not start ({error}); the run goes on without it. --wandb offline needs no account."
                )
                self.trainer.loggers = [other for other in self.trainer.loggers if other is not logger]

    def after_fit(self) -> None:
        """Test the best weights, write the report, print the summary."""
        trainer = self.trainer
        if self._get(self.config, "test_after_fit") and not self._get(self.config, "trainer").fast_dev_run:
            trainer.test(self.model, datamodule=self.datamodule, ckpt_path=_best(trainer), verbose=False)
        for logger in trainer.loggers:
            if self.run_folder is not None and isinstance(logger, RecordLogger):
                self.run_folder.finish(logger, time.monotonic() - self._began)
        self._conclude()

    def after_test(self) -> None:
        """Write the report and print the summary."""
        self._conclude()

    def _conclude(self) -> None:
        records = [logger for logger in self.trainer.loggers if isinstance(logger, RecordLogger)]
        if not records or not self.trainer.is_global_zero or not records[0].path.is_file():
            return
        folder = records[0].folder
        console = Console(width=None if sys.stdout.isatty() else 100)
        console.print(summary_table(read_record(folder)))
        if self._get(self.config, "report"):
            console.print(f"report: {write_quietly([folder])}", soft_wrap=True, highlight=False)
        console.print(f"record: {folder.absolute()}", soft_wrap=True, highlight=False)
        for logger in self.trainer.loggers:
            if type(logger).__name__ == "WandbLogger" and os.environ["WANDB_MODE"] == "offline":
                synced = Path(logger.experiment.dir).absolute().parent  # type: ignore[attr-defined]
                console.print(f"W&B:    wandb sync {synced}", soft_wrap=True, highlight=False)


def run(args: list[str] | dict[str, Any] | None = None) -> NormgeoCLI:
    """Run a command and return the finished command line, with its trainer, model and data.

    Args:
        args: as on the command line, ``["fit", "--config", "…"]``; ``sys.argv`` if left out.
    """
    return NormgeoCLI(args)


def main(args: list[str] | None = None) -> None:
    """Run a command from the shell; see :func:`one_line_errors`."""
    try:
        with one_line_errors():
            run(args)
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()


def _unplaced(config: Any) -> Any:
    """Return a configuration without the folder and the names of the run, which another run with it must not take."""
    config = config.clone()
    config["run"] = None
    loggers = config.trainer.logger
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        for name in ("version", "id"):
            if hasattr(logger, "init_args") and name in logger.init_args:
                logger.init_args[name] = None
    return config


def _as_dict(block: Any) -> dict[str, Any] | None:
    return None if block is None else dict(block.as_dict() if hasattr(block, "as_dict") else block)


def _best(trainer: Trainer) -> str | None:
    """Return the best checkpoint, or None for the weights as they are."""
    best: str = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best and not Path(best).exists():  # a run that went on elsewhere has left it behind
        warn_once(f"The best checkpoint {best} is gone; the last weights are tested instead.")
        return None
    return best or None


def _wandb_id(trainer: Trainer) -> str | None:
    ids = [str(logger.version) for logger in trainer.loggers if type(logger).__name__ == "WandbLogger"]
    return ids[0] if ids else None


def _num_classes(data: Any) -> int:
    classes = getattr(data, "num_classes", None)
    if classes is None:
        raise ConfigurationError(
            f"{type(data).__name__} does not say how many classes it has. Give it an attribute num_classes."
        )
    return int(classes)
