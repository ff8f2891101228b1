"""What a divided model computes with: ``fully_shard`` puts whole parameters in place of the divided ones.

It does so around the forward pass of a module, and puts them back. They are the leaves of the autograd graph; the
optimizers never see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_normgeo.probes.sharded.shards import is_sharded

_Entries = list[tuple[nn.Module, str, str]]
"""Parameters as (module, attribute, name)."""


class UnshardedParameters:
    """Notes which whole parameter stands in for which divided one, between :meth:`watch` and :meth:`rest`.

    Args:
        module: the model, before any forward pass.
        names: of its parameters, by id.
        kind: the class of modules that ``fully_shard`` was applied to.
        compiled: whether it runs under ``torch.compile``, which a new hook would make trace everything anew.
    """

    def __init__(self, module: nn.Module, names: Mapping[int, str], kind: type, compiled: bool = False) -> None:
        self._managed = {} if compiled else _managed(module, names, kind)
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def names(self) -> dict[int, str]:
        """The names by id of all that was noted since :meth:`watch`."""
        return {key: name for key, (name, _) in self._seen.items()}

    def watch(self) -> None:
        """Note what forward passes compute with from here on."""
        self.rest()
        for module, entries in self._managed.items():
            # behind the hook of fully_shard, which always comes first
            self._handles.append(module.register_forward_pre_hook(partial(self._note, entries)))

    def rest(self) -> None:
        """Remove every hook and forget what was noted."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}

    def _note(self, entries: _Entries, module: nn.Module, args: Any) -> None:
        for owner, attribute, name in entries:
            parameter = owner._parameters.get(attribute)
            if parameter is not None and not is_sharded(parameter):
                self._seen[id(parameter)] = (name, parameter)


def _managed(module: nn.Module, names: Mapping[int, str], kind: type) -> dict[nn.Module, _Entries]:
    """Return for each module of ``kind`` the parameters below it that no other one below it has, and own ones for all.

    The first find what is used without a call of its owner, the others what is called in another way than forward.
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
