"""Surrogate of a model: the same network with the weights of another checkpoint, from which attacks are transferred."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.utilities.checked_values import first_line, short_repr


def check_surrogate(given: Any, is_used: bool) -> None:
    """Check that a surrogate is given if attacks are to be transferred, and that it can be one.

    Args:
        given: a network, or the path of a checkpoint; None for none.
        is_used: whether an attack is transferred.

    Raises:
        ConfigurationError: if it is missing, without use, or neither a network nor a path.
    """
    if given is not None and not isinstance(given, (nn.Module, str, Path)):
        raise ConfigurationError(f"surrogate={short_repr(given)} must be a network, or the path of a checkpoint.")
    if is_used and given is None:
        raise ConfigurationError(
            "attacks has 'transfer', which needs another network: give surrogate=… with the path of a checkpoint of "
            "the same network (in Python also a network)."
        )
    if given is not None and not is_used:
        raise ConfigurationError("surrogate is given, but no attack is transferred from it. Add 'transfer' to attacks.")


def surrogate_of(module: nn.Module, given: nn.Module | str | Path | None) -> nn.Module | None:
    """Return the surrogate in evaluation mode; None without one.

    Args:
        module: the model, which is copied and left unchanged.
        given: a network, or the path of a checkpoint of Lightning or of a state dictionary, with the model's own names.

    Raises:
        ConfigurationError: for a file that cannot be read, or weights that do not fit the model.
    """
    if given is None or isinstance(given, nn.Module):
        return given
    try:
        found = torch.load(given, map_location="cpu", weights_only=True)
        weights = found.get("state_dict", found)
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        copied = copy.deepcopy(module)
        copied.load_state_dict(weights)
    except Exception as error:
        raise ConfigurationError(
            f"surrogate={short_repr(str(given))} gives no surrogate ({first_line(error)}). Give a checkpoint of the "
            "same network."
        ) from error
    return copied.to(device).eval()
