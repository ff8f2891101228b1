"""Options that this package adds to those of Lightning's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.cli import LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_normgeo.errors import ConfigurationError

_NOT_FILES = ("best", "last", "hpc", "registry")
"""Beginnings of ``--ckpt_path`` that Lightning takes for keywords, not for names of files."""
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


def check_exists(checkpoint: str | None) -> None:
    """Check that a checkpoint exists.

    Args:
        checkpoint: Value of ``--ckpt_path``; keywords of Lightning, URLs and None are accepted.

    Raises:
        ConfigurationError: If the file does not exist; the message names checkpoints nearby.
    """
    if checkpoint is None or checkpoint.startswith(_NOT_FILES) or "://" in checkpoint or Path(checkpoint).exists():
        return
    folder = next(path for path in Path(checkpoint).absolute().parents if path.is_dir())
    there = sorted(str(path.relative_to(folder)) for path in folder.glob("**/*.ckpt"))[:8]
    beside = f"{folder} has {', '.join(there)}" if there else f"there is none below {folder}"
    raise ConfigurationError(f"--ckpt_path {checkpoint} does not exist; {beside}.")


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
