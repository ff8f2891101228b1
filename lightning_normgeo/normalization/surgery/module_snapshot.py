"""Going back on changes to modules: their parts, classes and values as they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """Modules as they are, to be put back after a change that is not to stay.

    Parameters, buffers and submodules stay the same objects. Values of parameters are copied, those of buffers are not.

    Args:
        modules: whose attributes, registered parts and class may change.
        tensors: whose values may change in place.
    """

    def __init__(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> None:
        self._modules = [(module, type(module), _attributes(module)) for module in dict.fromkeys(modules)]
        unique = {id(tensor): tensor for tensor in tensors}.values()
        self._tensors = [(tensor, tensor.data, tensor.detach().clone(), tensor.requires_grad) for tensor in unique]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for module, kind, attributes in self._modules:
            module.__class__ = kind  # parametrizations give a layer a class of its own
            vars(module).clear()
            for name, (value, entries) in attributes.items():
                if entries is not None:
                    value.clear()
                    value.update(entries)
                vars(module)[name] = value
        for tensor, data, values, trained in self._tensors:
            data.copy_(values)
            tensor.data = data
            tensor.requires_grad_(trained)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """Return each attribute with the entries that it has, if it is a dictionary."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()}
