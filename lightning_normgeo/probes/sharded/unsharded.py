"""Names of the unsharded parameters that a sharded model computes with.

Around the forward pass of a module ``fully_shard`` replaces its sharded parameters by unsharded ones, gathered from all
processes. These are the leaves of the autograd graph, while the optimizers only hold the sharded ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_normgeo.geometry.rows import is_sharded

_Entries = list[tuple[nn.Module, str, str]]
"""Parameters as (owning module, attribute, name in the model)."""


class UnshardedParameters:
    """Tracker that records the names of unsharded parameters during forward passes, until :meth:`rest`.

    Args:
        module: the model, before any forward pass.
        names: names of its sharded parameters by id.
        kind: class of the modules that ``fully_shard`` was applied to.
        compiled: whether the model runs under ``torch.compile``. Nothing is recorded then, since a new hook would
            compile the model again.
    """

    def __init__(self, module: nn.Module, names: Mapping[int, str], kind: type, compiled: bool = False) -> None:
        self._managed = {} if compiled else _managed(module, names, kind)
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def names(self) -> dict[int, str]:
        """The names of the unsharded parameters recorded since :meth:`watch`, by id."""
        return {key: name for key, (name, _) in self._seen.items()}

    def watch(self) -> None:
        """Begin to record unsharded parameters."""
        self.rest()
        for module, entries in self._managed.items():
            # it runs after the hook of fully_shard that gathers the parameters, which is always the first
            self._handles.append(module.register_forward_pre_hook(partial(self._note, entries)))

    def rest(self) -> None:
        """Remove every hook and discard the records."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}

    def _note(self, entries: _Entries, module: nn.Module, args: Any) -> None:
        for owner, attribute, name in entries:
            parameter = owner._parameters.get(attribute)
            if parameter is not None and not is_sharded(parameter):
                # the parameter is kept with its name, since its id could be reused once it is freed
                self._seen[id(parameter)] = (name, parameter)


def _managed(module: nn.Module, names: Mapping[int, str], kind: type) -> dict[nn.Module, _Entries]:
    """Return the parameters to look up before the forward pass of each module.

    For every module these are its own parameters. A module of ``kind`` gathers in addition the parameters of all
    modules below it, down to the next modules of ``kind``. The latter finds parameters that are used without calling
    the forward of their owner; the former those of modules that are reached without the forward of the module of
    ``kind`` above them.
    """
    found: dict[nn.Module, _Entries] = {}
    stack: list[tuple[nn.Module, nn.Module | None]] = [(module, None)]
    seen: set[nn.Module] = set()
    while stack:
        child, manager = stack.pop()
        if child in seen:
            continue
        seen.add(child)
        manager = child if isinstance(child, kind) else manager
        own = [(child, key, names[id(p)]) for key, p in child._parameters.items() if id(p) in names]
        for called in {child, manager or child} if own else ():
            found.setdefault(called, []).extend(own)
        stack += [(grandchild, manager) for grandchild in child.children()]
    return found
