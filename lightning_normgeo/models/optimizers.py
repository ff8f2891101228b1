"""Optimizers and schedulers from blocks with ``class_path`` and ``init_args``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pytorch_lightning.cli import instantiate_class

from lightning_normgeo.errors import ConfigurationError, said_in_one_line
from lightning_normgeo.utilities.checked_values import short_repr


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
    settings = dict(block.as_dict()) if hasattr(block, "as_dict") else dict(block)
    try:
        return instantiate_class(first, settings)
    except Exception as error:  # of any class
        raise ConfigurationError(f"{option} {_chosen(settings)} cannot be built: {said_in_one_line(error)}") from error


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
