"""Snapshot of modules, to undo a change of their attributes, submodules, classes and parameter values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """The state of some modules, which can be restored after a change.

    Parameters, buffers and submodules stay the same objects. The values of parameters are copied, those of buffers are
    not.

    Args:
        modules: modules whose attributes, parameters, buffers, submodules and class may change.
        tensors: parameters whose values may change in place.
    """

    def __init__(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> None:
        self._modules = [(module, type(module), _attributes(module)) for module in dict.fromkeys(modules)]
        unique = {id(tensor): tensor for tensor in tensors}.values()
        self._tensors = [(tensor, tensor.data, tensor.detach().clone(), tensor.requires_grad) for tensor in unique]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all modules and tensors."""
        for module, kind, attributes in self._modules:
            module.__class__ = kind  # registering a parametrization replaces the class of a layer
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
    """Return each attribute of a module, and a copy of its entries if it is a dictionary."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()}
