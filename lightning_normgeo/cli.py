"""The command line: ``normgeo fit | validate | test | predict``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.models.resnet import ResNetClassifier
from lightning_normgeo.record import RecordLogger, check_writable, read_record
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
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, RecordLogger):
                logger.folder.mkdir(parents=True, exist_ok=True)
                (logger.folder / "config.yaml").write_text(text, encoding="utf-8")
                logger.log_hyperparams({"wandb": {"id": _wandb_id(trainer)}})
            logger.log_hyperparams({"config": yaml.safe_load(text)})


class NormgeoCLI(LightningCLI):
    """LightningCLI with the package's defaults; ``fit`` ends with the test loop on the best weights and a report."""

    def __init__(self, args: list[str] | dict[str, Any] | None = None) -> None:
        defaults = {"default_config_files": [str(configs_folder() / "defaults.yaml")]}
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
            help="Folder of the run, <folder>/<study>/<name>. The same command again goes on from the last checkpoint. "
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
        for kind, settings in self._loggers():
            save_dir = settings.get("save_dir")
            if kind == "RecordLogger" and save_dir:  # here, as jsonargparse would bury the error of a list's entry
                check_writable(save_dir, settings.get("name", ""))
            if kind == "WandbLogger" and save_dir:
                os.environ.setdefault("WANDB_DATA_DIR", str(Path(save_dir).absolute() / "wandb-data"))

    def _loggers(self) -> list[tuple[str, Any]]:
        """Return the class names and settings of the loggers to be built."""
        loggers = self._get(self.config, "trainer").get("logger")
        entries = loggers if isinstance(loggers, list) else [loggers]
        known = [entry for entry in entries if hasattr(entry, "get")]
        return [(entry.get("class_path", "").rpartition(".")[2], entry.get("init_args", {})) for entry in known]

    def _take_folder(self) -> None:
        """Send the run where ``--run`` says, and on from where it was."""
        given = self._get(self.config, "run")
        self.run_folder = folder = RunFolder(given) if given else None
        if folder is None:
            return
        loggers = self._loggers()
        if "RecordLogger" not in [kind for kind, _ in loggers]:
            raise ConfigurationError(f"--run {given} needs a RecordLogger among trainer.logger.")
        folder.claim()
        if self.subcommand == "fit" and folder.finished:
            raise ConfigurationError(f"--run {given} has finished. Choose another folder, or remove this one.")
        for kind, settings in loggers:
            of_wandb = {"name": folder.path.name, "id": folder.wandb_id}
            places: dict[str, dict[str, Any]] = {"RecordLogger": folder.logger_settings, "WandbLogger": of_wandb}
            for name, value in places.get(kind, {}).items():
                settings[name] = value
        config = self.config[self.subcommand]
        config.trainer.default_root_dir = config.trainer.default_root_dir or given
        config.ckpt_path = config.get("ckpt_path") or folder.checkpoint

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
            best = getattr(trainer.checkpoint_callback, "best_model_path", "")
            found = Path(best).is_file() if best else False  # a run resumed elsewhere may have left it behind
            trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best if found else None, verbose=False)
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
            console.print(f"report: {_report(folder)}", soft_wrap=True, highlight=False)
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
    cli = NormgeoCLI(args)
    if cli.run_folder is not None:
        cli.run_folder.release()
    return cli


def main(args: list[str] | None = None) -> None:
    """Run a command from the shell; see :func:`one_line_errors`."""
    try:
        with one_line_errors():
            run(args)
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Let a setting that cannot work end in one clear line and exit status 2."""
    try:
        yield
    except ValueError as error:
        cause = _configuration_error(error)
        if cause is None:
            raise
        sys.stderr.write(f"normgeo: error: {cause}\n")
        raise SystemExit(2) from error


class _ParsedCLI(NormgeoCLI):
    """Stops where the classes would be built."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what is given, and not warn that it is not what the shell gave."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Do nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def after_instantiate_classes(self) -> None:
        """Do nothing."""

    def _set_seed(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(args: list[str]) -> Any:
    """Parse a command and return its settings; nothing is built and nothing runs.

    Raises:
        SystemExit: for settings that cannot be parsed, after saying so.
    """
    cli = _ParsedCLI(args)
    return cli.config[cli.subcommand]


def _configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """Return the error of ours that ``error`` is or was caused by: jsonargparse wraps what constructors raise."""
    if error is None or isinstance(error, ConfigurationError):
        return error
    return _configuration_error(error.__cause__ or error.__context__)


def _as_dict(block: Any) -> dict[str, Any] | None:
    return None if block is None else dict(block.as_dict() if hasattr(block, "as_dict") else block)


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


def _report(folder: Path) -> str:
    try:
        from lightning_normgeo.report import write_report
    except ImportError as error:
        return f"not written, {error.name} is missing: pip install 'lightning-normgeo[report]'"
    return str(write_report(folder).absolute())
