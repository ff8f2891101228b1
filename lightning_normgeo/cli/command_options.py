"""Options that this package adds to those of Lightning's commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.cli import LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.utilities.files import is_address

_LARGEST_SEED = 2**32 - 1


def add_options(parser: LightningArgumentParser) -> None:
    """Add the optimizer blocks, the links between data and model, and the options of a run."""
    for base, key, skip in ((Optimizer, "optimizer", "params"), (LRScheduler, "lr_scheduler", "optimizer")):
        # not built here: the model first splits its parameters into decayed and undecayed groups
        parser.add_subclass_arguments(base, key, instantiate=False, required=False, fail_untyped=False, skip={skip})
        parser.link_arguments(key, f"model.{key}", compute_fn=_as_dict)
    parser.link_arguments("data", "model.num_classes", compute_fn=_num_classes, apply_on="instantiate")
    parser.add_argument(
        "--run",
        type=str | None,
        default=None,
        help="Folder of the run, <folder>/<study>/<name>. The same command again resumes the run from its last "
        "checkpoint. Default: a new folder, named after the time at which the run starts.",
    )
    parser.add_argument(
        "--wandb",
        type=Literal["offline", "online", "disabled"] | None,
        default=None,
        help="W&B mode. Default: the environment variable WANDB_MODE, else offline: nothing leaves the machine.",
    )
    parser.add_argument(
        "--test_after_fit",
        type=bool,
        default=True,
        help="After fit, run the test loop (with RobustnessEvaluation) on the best checkpoint.",
    )
    parser.add_argument("--report", type=bool, default=True, help="Write report.html into the run's folder at the end.")


def check_exists(checkpoint: str | None, command: str, kept: Sequence[str | None]) -> None:
    """Check that a checkpoint exists, so that no command fails late or evaluates random weights instead.

    Args:
        checkpoint: Value of ``--ckpt_path``. None, URLs and Lightning's ``hpc`` and ``registry:…`` are accepted, and
            ``last`` where there can be a last one: in ``fit``, or in a folder that ModelCheckpoint was given.
        command: Name of the command, such as ``fit``.
        kept: Folders of checkpoints that the configuration gives to callbacks.

    Raises:
        ConfigurationError: If there is no such file, or it is a folder of other things than one sharded checkpoint; the
            message names checkpoints nearby.
    """
    if checkpoint is None or checkpoint == "hpc" or checkpoint.startswith("registry") or is_address(checkpoint):
        return
    if checkpoint in ("best", "last"):
        if checkpoint == "best" or not (command == "fit" or any(map(_has_checkpoints, kept))):
            raise ConfigurationError(
                f"--ckpt_path {checkpoint} is a checkpoint of a training in the same process, and normgeo {command} "
                f"has none. Give the path of a file; {_checkpoints_below(Path.cwd())}."
            )
        return
    path = Path(checkpoint)
    if not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise ConfigurationError(f"--ckpt_path {checkpoint} does not exist; {_checkpoints_below(folder)}.")
    if path.is_dir() and path.suffix != ".ckpt" and not (path / "meta.pt").is_file():  # sharded checkpoints are folders
        raise ConfigurationError(f"--ckpt_path {checkpoint} is a folder, not a checkpoint; {_checkpoints_below(path)}.")


def _checkpoints_below(folder: Path) -> str:
    """Return a clause that names the first checkpoints in a folder and the folders in it."""
    there = sorted(str(path.relative_to(folder)) for path in folder.glob("**/*.ckpt"))[:8]
    return f"{folder} has {', '.join(there)}" if there else f"there is none below {folder}"


def _has_checkpoints(folder: str | None) -> bool:
    return folder is not None and (is_address(folder) or any(Path(folder).glob("*.ckpt")))


def check_seed(seed: Any) -> None:
    """Refuse a value of ``--seed_everything`` that is no seed of numpy.

    Args:
        seed: The value, a number or true or false.

    Raises:
        ConfigurationError: For a negative number or one of more than 32 bits.
    """
    if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed <= _LARGEST_SEED:
        raise ConfigurationError(f"--seed_everything {seed} cannot be used. Choose one from 0 to {_LARGEST_SEED}.")


def _as_dict(block: Any) -> dict[str, Any] | None:
    return None if block is None else _listed(dict(block.as_dict() if hasattr(block, "as_dict") else block))


def _listed(value: Any) -> Any:
    """Return a value with lists in place of tuples, such as Adam's betas: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value


def _num_classes(data: Any) -> int:
    classes = getattr(data, "num_classes", None)
    if classes is None:
        raise ConfigurationError(
            f"{type(data).__name__} does not say how many classes it has. Give it an attribute num_classes."
        )
    return int(classes)
