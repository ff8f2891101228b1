"""Optimizers and schedulers from blocks with ``class_path`` and ``init_args``."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from pytorch_lightning.callbacks import EarlyStopping, Timer
from pytorch_lightning.cli import instantiate_class
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_normgeo.errors import ConfigurationError, said_in_one_line
from lightning_normgeo.utilities.checked_values import short_repr

_MOST_EPOCHS = 10_000
"""Epochs of the longest training whose schedule is rehearsed to its end."""


def check_block(option: str, block: Any) -> None:
    """Refuse a value for ``optimizer`` or ``lr_scheduler`` that is no dictionary with ``class_path``.

    Raises:
        ConfigurationError: For any other value than None.
    """
    held = getattr(block, "as_dict", lambda: block)()
    if block is not None and not (isinstance(held, dict) and "class_path" in held):
        raise ConfigurationError(
            f"{option}={short_repr(block)} must be a dictionary with class_path and init_args, as "
            "{'class_path': 'torch.optim.SGD', 'init_args': {'lr': 0.1}}."
        )


def built(option: str, block: Any, first: Any) -> Any:
    """Return the object that a block describes.

    Args:
        option: Name of the option, ``optimizer`` or ``lr_scheduler``, for the message.
        block: Dictionary with ``class_path`` and ``init_args``, or the Namespace that the command line passes.
        first: First argument of the class, such as the parameters of the model.

    Raises:
        ConfigurationError: If the class does not exist or refuses its arguments, with its reason.
    """
    settings = _settings(block)
    try:
        return instantiate_class(first, settings)
    except Exception as error:  # of any class
        raise ConfigurationError(f"{option} {_chosen(settings)} cannot be built: {said_in_one_line(error)}") from error


def rehearse(schedule: Any, optimizer: Any, settings: Any, epochs: int) -> None:
    """Refuse a schedule that would end the training after some epoch, as a period of zero does.

    The schedule is stepped on an optimizer of the same class with one number in each group; the real ones stay as they
    are. Cost: tens of microseconds per epoch.

    Args:
        schedule: Block of the schedule.
        optimizer: Optimizer of the training, not yet connected to a schedule.
        settings: Block of the optimizer.
        epochs: Number of epochs after which the schedule is stepped.

    Raises:
        ConfigurationError: With the epoch and the reason.
    """
    groups = [
        {**group, "params": [torch.zeros([1] * group["params"][0].ndim, requires_grad=True)]}
        for group in optimizer.param_groups
        if group["params"]
    ]
    with warnings.catch_warnings():  # of steps before those of the optimizer
        warnings.simplefilter("ignore")
        stepped = built("lr_scheduler", schedule, built("optimizer", settings, groups))
        for epoch in range(0 if isinstance(stepped, ReduceLROnPlateau) else epochs):
            try:
                stepped.step()
            except Exception as error:  # of any class
                raise ConfigurationError(
                    f"lr_scheduler {_chosen(_settings(schedule))} fails after epoch {epoch}: "
                    f"{said_in_one_line(error).rstrip('.')}. It is stepped once per epoch."
                ) from error


def certain_epochs(trainer: Any) -> int:
    """Return the number of epochs that a training will have unless it is stopped; 1 if that is not known."""
    known = trainer is not None and trainer.max_epochs is not None and 0 < trainer.max_epochs <= _MOST_EPOCHS
    early = not known or any(isinstance(one, EarlyStopping | Timer) for one in trainer.callbacks)
    if early or trainer.max_steps > 0:
        return 1
    return int(trainer.max_epochs)


def _settings(block: Any) -> dict[str, Any]:
    return dict(block.as_dict()) if hasattr(block, "as_dict") else dict(block)


def _chosen(settings: Mapping[str, Any]) -> str:
    """Return a class and those of its arguments that differ from their defaults, of which a parser adds all."""
    path = settings["class_path"]
    module, _, name = path.rpartition(".")
    try:
        defaults = inspect.signature(getattr(sys.modules.get(module), name)).parameters
    except (AttributeError, TypeError, ValueError):
        defaults = MappingProxyType({})
    arguments = settings.get("init_args") or {}
    said = [one for one in arguments if one not in defaults or defaults[one].default != arguments[one]]
    return f"{path}({', '.join(f'{one}={short_repr(arguments[one])}' for one in said)})"
