"""Short help texts of the commands, printed without importing torch."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_normgeo._version import __version__
from lightning_normgeo.errors import nearest_names
from lightning_normgeo.terminal.shipped_configs import shipped_configs, title_of

TRAINER_COMMANDS = {
    "fit": "train, measure the geometry, test under noise and attack, write a report",
    "validate": "evaluate a checkpoint on the validation data, under noise and attack",
    "test": "evaluate a checkpoint on the test data, under noise and attack",
    "predict": "predict with a checkpoint",
}
"""Descriptions of the commands of Lightning's Trainer."""
OWN_COMMANDS = {
    "study": "run a grid of trainings, resume it, and report on it",
    "report": "compare runs: one HTML page, tables, pictures, or a report of W&B",
    "configs": "list the configurations that come with the package, or print one",
}
"""Descriptions of the commands that need no Trainer."""

ALL_OPTIONS = "--help-all"
"""The option that prints the help of all options, including Lightning's."""

RUN_OPTIONS = {
    "--run FOLDER": "folder; the same command again resumes it [runs/normgeo/TIME]",
    "--wandb MODE": "offline, online or disabled [$WANDB_MODE, else offline]",
    "--test_after_fit BOOL": "test the best checkpoint at the end [true]",
    "--report BOOL": "write report.html into the folder of the run [true]",
    "--ckpt_path FILE": "checkpoint to start from",
    "--seed_everything INT": "seed of all random numbers [0]",
}
MODEL_OPTIONS = {
    "--model.arch NAME": "resnet18, resnet34, resnet50, resnet101 or resnet152 [resnet101]",
    "--model.norm NAME": "bn ln in gn, wn cwn ws sn, none, or a pair such as gn+ws [bn]",
    "--model.stem NAME": "cifar: 3x3, for small images; imagenet: 7x7 and pooling [cifar]",
    "--model.groups INT": "groups of gn [32]",
    "--model.unbiased BOOL": "whether ws divides by n - 1 [true]",
    "--model.zero_init_residual BOOL": "start residual branches at zero [where no layer normalizes]",
    "--model.label_smoothing X": "of the cross entropy [0]",
    "--model.input_mean LIST": "mean of each color channel [0.5, 0.5, 0.5]",
    "--model.input_std LIST": "standard deviation of each color channel [0.25, 0.25, 0.25]",
    "--model.decayed NAME": "all, weights, invariant or none: what weight decay touches [all]",
}
DATA_OPTIONS = {
    "--data CLASS": "DigitsDataModule, CIFARDataModule, ImageFolderDataModule, …",
    "--data.batch_size INT": "and its other arguments; --data.help CLASS lists them",
    "--optimizer CLASS": "of torch.optim or any package; --optimizer.lr X and so on",
    "--lr_scheduler CLASS": "of torch.optim.lr_scheduler; --lr_scheduler.T_max N and so on",
}
TRAINER_OPTIONS = {
    "--trainer.max_epochs INT": "length of the training",
    "--trainer.accelerator NAME": "cpu, gpu, mps, … [auto]",
    "--trainer.devices N": "how many [auto]",
    "--trainer.precision NAME": "32-true, bf16-mixed, 16-mixed, … [32-true]",
    "--trainer.log_every_n_steps INT": "steps between two measurements [20]",
    "--trainer.fast_dev_run BOOL": "try one batch of everything, write nothing [false]",
}
_SECTIONS = {
    "run": RUN_OPTIONS,
    "model": MODEL_OPTIONS,
    "data and optimizer": DATA_OPTIONS,
    "Trainer (the usual ones)": TRAINER_OPTIONS,
}
_OF_FIT = ("--run", "--test_after_fit")
_CONFIG_OPTIONS = {
    "-c, --config FILE": "YAML file, or a name that normgeo configs lists; the last counts",
    "--print_config": "print all settings and exit",
    ALL_OPTIONS: "list every option, those of Lightning too",
}
_WIDTH = 33


def overview() -> str:
    """Return the overview of all commands, the output of ``normgeo`` without arguments."""
    commands = _rows({f"  {name}": text for name, text in (TRAINER_COMMANDS | OWN_COMMANDS).items()}, 12)
    return f"""normgeo {__version__}: the geometry of normalization, measured while you train.

  normgeo fit --config quickstart     a first run: a few minutes on two CPU cores
  normgeo study paper_small --jobs 2  the paper's comparison, as one command
  normgeo report runs/normgeo         one HTML page of all runs in a folder

{commands}

normgeo COMMAND --help explains the options of a command. Your own Lightning project needs no
command: add the callbacks to your Trainer (OrthogonalityMonitor, NormGrowthMonitor,
AffineConvergenceMonitor, RobustnessEvaluation), and RecordLogger to its loggers."""


def command_help(command: str) -> str:
    """Return the help of a command of the Trainer: the options of this package, then common ones of the Trainer.

    Args:
        command: one of :data:`TRAINER_COMMANDS`.
    """
    sections = [
        f"{title}:\n" + _rows({f"  {option}": text for option, text in _offered(command, options).items()}, _WIDTH)
        for title, options in _SECTIONS.items()
    ]
    text = TRAINER_COMMANDS[command]
    return "\n\n".join([f"normgeo {command}: {text}.", _examples(command), _configuration(), *sections])


def unknown_command(command: str) -> str:
    """Return the error message for an unknown command, or for an option in place of a command."""
    if command.startswith("-"):
        return f"{command} comes after the command, one of {', '.join([*TRAINER_COMMANDS, *OWN_COMMANDS])}."
    return f"{command!r} is no command. Choose one of: {nearest_names(command, [*TRAINER_COMMANDS, *OWN_COMMANDS])}."


def config_list() -> str:
    """Return the list of names and titles of the configurations that come with the package."""
    rows = {f"  {name}": title_of(file) for name, file in shipped_configs().items()}
    return f"{_rows(rows, 26)}\n\nnormgeo configs NAME prints one; --config NAME and normgeo study NAME take them."


def _examples(command: str) -> str:
    if command == "fit":
        return (
            "  normgeo fit --config quickstart\n"
            "  normgeo fit --config quickstart --model.norm ws --optimizer.lr 0.01\n"
            "  normgeo fit --config cifar10/resnet101_bn --config norm/gn_wd --run runs/mine/gn"
        )
    return f"  normgeo {command} --config FOLDER/config.yaml --ckpt_path FOLDER/checkpoints/last.ckpt"


def _configuration() -> str:
    return "configuration:\n" + _rows({f"  {option}": text for option, text in _CONFIG_OPTIONS.items()}, _WIDTH)


def _offered(command: str, options: Mapping[str, str]) -> dict[str, str]:
    return {option: text for option, text in options.items() if command == "fit" or not option.startswith(_OF_FIT)}


def _rows(rows: Mapping[str, str], width: int) -> str:
    """Return rows as text in two columns; a name that is wider than its column gets its own line."""
    lines = []
    for name, text in rows.items():
        if len(name) <= width:
            lines.append(f"{name:{width}} {text}")
        else:
            lines += [name, f"{'':{width}} {text}"]
    return "\n".join(lines)
