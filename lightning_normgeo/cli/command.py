"""The command line: ``normgeo fit | validate | test | predict``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

import lightning_normgeo.callbacks
import lightning_normgeo.data  # noqa: F401 - so that short class names work in configurations
from lightning_normgeo._version import __version__
from lightning_normgeo.cli.cleanup import has_logged, missing_parents, remove_traces
from lightning_normgeo.cli.command_options import add_options, check_exists, check_seed
from lightning_normgeo.cli.config_files import check_config_files
from lightning_normgeo.cli.console_filter import keep_quiet
from lightning_normgeo.cli.devices import warn_of_crowd
from lightning_normgeo.cli.end_of_command import (
    NothingToTrain,
    interruption_of,
    save_predictions,
    tell_begin,
    tell_end,
    tell_interruption,
    tell_no_checkpoint,
)
from lightning_normgeo.cli.loggers import end_wandb, shield, start_wandb
from lightning_normgeo.cli.parser import OneLineParser
from lightning_normgeo.cli.saved_config import RecordConfig
from lightning_normgeo.errors import ConfigurationError, is_rank_zero, one_line_errors, said_in_one_line
from lightning_normgeo.models.resnet import ResNetClassifier
from lightning_normgeo.runs.folders.new_folders import check_writable, claim_version
from lightning_normgeo.runs.folders.resume import NewestEpoch, RandomState, best_checkpoint, keeps_the_best
from lightning_normgeo.runs.folders.run_folder import RunFolder
from lightning_normgeo.runs.records.record_logger import RecordLogger
from lightning_normgeo.terminal.shipped_configs import DEFAULTS, shipped_configs, with_config_paths
from lightning_normgeo.terminal.short_help import TRAINER_COMMANDS
from lightning_normgeo.utilities.checkpoints import check_checkpoint, load_weights_only
from lightning_normgeo.utilities.files import is_address, user_path


class NormgeoCLI(LightningCLI):
    """LightningCLI with the package's defaults; ``fit`` ends with the test loop on the best weights and a report.

    Attributes:
        run_folder: Folder given with ``--run``; None without that option.
    """

    run_folder: RunFolder | None = None

    def __init__(self, args: list[str] | dict[str, Any] | None = None) -> None:
        self._given: list[str] = []
        self._place: Path | None = None
        self._made: list[Path] = []
        defaults = {"default_config_files": [str(shipped_configs()[DEFAULTS])]}
        try:
            super().__init__(
                ResNetClassifier,
                LightningDataModule,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=RecordConfig,
                save_config_kwargs={"save_to_log_dir": False},
                auto_configure_optimizers=False,
                parser_kwargs={"version": __version__, **{name: dict(defaults) for name in self.subcommands()}},
                args=args,
            )
        except BaseException as error:  # also SystemExit and KeyboardInterrupt, which end a run by a signal
            self._end_early(error)
            raise
        finally:  # LightningCLI runs the whole command in its constructor
            if self.run_folder is not None:
                self.run_folder.release()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands by name, each with those arguments of its Trainer method that are not options."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in TRAINER_COMMANDS}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose error messages are one line."""
        parser = super().init_parser(**kwargs)
        parser.__class__ = OneLineParser  # Lightning hard-codes the class of its parser
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Replace the names of shipped configurations by their paths, and parse the arguments."""
        if isinstance(args, dict):
            super().parse_arguments(parser, args)
            return
        self._given = list(sys.argv[1:] if args is None else args)
        self.config = self._parsed(parser, self._given)

    def _parsed(self, parser: Any, arguments: list[str]) -> Any:
        given = with_config_paths(arguments)
        check_config_files(given)
        for each in (parser, *self._subcommand_parsers.values()):
            each.given = given
            each.commands = self._subcommand_parsers
        config = parser.parse_args(given)
        check_seed(config[config.subcommand].get("seed_everything"))
        return config

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer.

        Raises:
            ConfigurationError: If the Trainer refuses a setting.
        """
        try:
            trainer: Trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise _one_line(error) from error
        warn_of_crowd(trainer)
        return trainer

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the optimizer blocks, the links between data and model, and the options of a run."""
        add_options(parser)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would silently override the configuration with the checkpoint's settings.

        :meth:`ResNetClassifier.on_load_checkpoint` reports where the two do not fit.
        """

    def before_instantiate_classes(self) -> None:
        """Set W&B's mode, choose the run's folder, and keep W&B's staging files in the same ``save_dir``."""
        os.environ["WANDB_MODE"] = self._get(self.config, "wandb") or os.environ.get("WANDB_MODE") or "offline"
        os.environ.setdefault("WANDB_SILENT", "true")
        for _, settings in self._entries("logger"):
            if settings.get("save_dir") and not is_address(settings["save_dir"]):
                settings["save_dir"] = str(user_path(settings["save_dir"]))
        kept = [settings.get("dirpath") for _, settings in self._entries("callbacks")]
        check_exists(self._get(self.config, "ckpt_path"), str(self.subcommand), kept)
        check_checkpoint(self._get(self.config, "ckpt_path"))
        if self._get(self.config, "run") is not None:
            self._take_folder()
        elif not self._get(self.config, "trainer").get("fast_dev_run"):
            self._claim_folder()
        for kind, settings in self._entries("logger"):
            save_dir = settings.get("save_dir")
            if kind == "WandbLogger" and save_dir:
                os.environ.setdefault("WANDB_DATA_DIR", str(Path(save_dir).absolute() / "wandb-data"))

    def _entries(self, kind: str) -> list[tuple[str, Any]]:
        """Return the class name and settings of every entry of ``trainer.<kind>``, such as ``logger``."""
        found = self._get(self.config, "trainer").get(kind)
        entries = found if isinstance(found, list) else [found]
        known = [entry for entry in entries if hasattr(entry, "get")]
        return [(entry.get("class_path", "").rpartition(".")[2], entry.get("init_args", {})) for entry in known]

    def _claim_folder(self) -> None:
        """Create a new folder for the run before its loggers are built, so that W&B can show its name."""
        loggers = self._entries("logger")
        record = next((settings for kind, settings in loggers if kind == "RecordLogger"), None)
        if record is None:
            return
        study = Path(record.get("save_dir") or "runs", record.get("name") or "normgeo")
        self._made = missing_parents(study)
        check_writable(str(study.parent), study.name)
        record["version"] = record.get("version") or claim_version(study)
        self._place = study / record["version"]
        for kind, settings in loggers:
            if kind == "WandbLogger" and not settings.get("name"):
                settings["name"] = record["version"]

    def _take_folder(self) -> None:
        """Write the run into the folder given with ``--run``."""
        given = self._get(self.config, "run")
        if self.subcommand != "fit":
            raise ConfigurationError(f"--run is for fit. Leave it out: {self.subcommand} gets a folder of its own.")
        if self._get(self.config, "trainer").get("fast_dev_run"):
            raise ConfigurationError(f"--run {given} with trainer.fast_dev_run, which writes nothing. Leave one out.")
        folder = RunFolder(given)
        self._made = missing_parents(folder.path.parent)
        folder.claim()
        self.run_folder = folder
        self._place = folder.path
        if folder.finished:
            raise ConfigurationError(f"--run {given} has finished. Choose another folder, or remove this one.")
        check_checkpoint(folder.checkpoint)
        folder.direct(self._entries("logger"))
        trainer = self.config[self.subcommand].trainer
        trainer.default_root_dir = trainer.default_root_dir or given

    def before_fit(self) -> None:
        """Resume the run from its own checkpoint, which takes precedence over an older one given as ``--ckpt_path``."""
        own = None if self.run_folder is None else self.run_folder.checkpoint
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        self._untrained = NothingToTrain(resumes=own is not None)
        callbacks[:0] = [RandomState(restore=own is not None), self._untrained]
        if self.run_folder is None:
            return
        settings = self.config_init["fit"]
        settings["ckpt_path"] = own or settings.get("ckpt_path")
        savers = self.trainer.checkpoint_callbacks
        if savers and all(map(keeps_the_best, savers)):
            callbacks.append(NewestEpoch(self.run_folder.path))

    def after_instantiate_classes(self) -> None:
        """Remove a W&B logger that cannot start, and guard the others so that their failures do not stop the run."""
        self._began = time.monotonic()
        load_weights_only(self.trainer.strategy)
        self.trainer.loggers = start_wandb(self.trainer.loggers)
        for logger in self.trainer.loggers:
            shield(logger)
        if is_rank_zero():
            tell_begin(self.trainer.loggers)
            if self.subcommand != "fit" and self._get(self.config, "ckpt_path") is None:
                tell_no_checkpoint(str(self.subcommand))

    def after_fit(self) -> None:
        """Test the best weights, write the report, and print the summary."""
        trainer = self.trainer
        self._untrained.tell(trainer)
        if self._get(self.config, "test_after_fit") and not self._get(self.config, "trainer").fast_dev_run:
            trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best_checkpoint(trainer), verbose=False)
        for logger in trainer.loggers:
            if self.run_folder is not None and isinstance(logger, RecordLogger):
                self.run_folder.finish(logger, time.monotonic() - self._began)
        self._conclude()

    def after_test(self) -> None:
        """Write the report and print the summary."""
        self._conclude()

    def after_validate(self) -> None:
        """Write the report and print the summary."""
        self._conclude()

    def after_predict(self) -> None:
        """Save the predictions, and print their path."""
        save_predictions(self.trainer, self._place)

    def _conclude(self) -> None:
        if self.trainer.is_global_zero:
            tell_end(self.trainer.loggers, self._get(self.config, "report"))

    def _end_early(self, error: BaseException) -> None:
        """Print how to resume an interrupted run; remove the files of a command that failed before it logged anything.

        Raises:
            SystemExit: With the exit status of the signal, if a signal ended the command.
            ConfigurationError: In place of Lightning's MisconfigurationException.
        """
        trainer: Trainer | None = getattr(self, "trainer", None)
        loggers = [] if trainer is None else trainer.loggers
        status = interruption_of(error, trainer)
        logged = self._place is not None and has_logged(self._place)
        if is_rank_zero() and not logged:
            remove_traces(loggers, self._place, self._made)
        if status is not None:
            if is_rank_zero() and logged and trainer is not None and self._place is not None:
                tell_interruption(trainer, self._given, self._place, RunFolder(self._place).checkpoint)
            elif is_rank_zero():
                sys.stderr.write("normgeo: interrupted before anything was measured; nothing is left behind.\n")
            raise SystemExit(status) from error
        if isinstance(error, MisconfigurationException):
            raise _one_line(error) from error


def run(args: list[str] | dict[str, Any] | None = None) -> NormgeoCLI:
    """Run a command and return the finished command line, with its trainer, model and data.

    Args:
        args: Arguments as on the command line, ``["fit", "--config", "…"]``, or a configuration as a dictionary.
            Default: ``sys.argv``.

    Raises:
        ConfigurationError: If a setting cannot work.
        SystemExit: If the arguments cannot be parsed (2) or a signal ended the command (130 or 143).
    """
    return NormgeoCLI(args)


def main(args: list[str] | None = None) -> None:
    """Run a command from the shell, with errors in one line; see :func:`one_line_errors`."""
    try:
        with one_line_errors():
            keep_quiet()
            run(args)
    finally:
        end_wandb()


def _one_line(error: Exception) -> ConfigurationError:
    return ConfigurationError(said_in_one_line(error))
