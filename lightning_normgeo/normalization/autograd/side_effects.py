"""Forward passes without side effects: attributes, parameters and random numbers of a model are left as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


@contextmanager
def without_side_effects(module: nn.Module) -> Iterator[None]:
    """Context in which a model may run forward, after which it is as before.

    Restored are the attributes of every submodule (:class:`Attributes`), parameters that the forward pass writes to
    (:class:`WrittenParameters`), and the random states of torch, numpy and Python. Buffers are not; layers that have
    not been initialized yet (``LazyLinear``) stay as the forward pass initializes them.

    Args:
        module: the model.

    Cost: a copy of the attributes' references, and of the parameters that are written to.
    """
    attributes = [Attributes(child) for child in module.modules() if not _is_lazy(child)]
    written = WrittenParameters(module)
    with random_states(gpus_of(module)):
        try:
            with written:
                yield
        finally:
            written.restore()
            for kept in attributes:
                kept.restore()


def gpus_of(module: nn.Module) -> list[torch.device]:
    """Return the GPUs that hold parameters of a module, sorted by name, since ``torch.device`` has no order."""
    return sorted({parameter.device for parameter in module.parameters() if parameter.is_cuda}, key=str)


@contextmanager
def random_states(devices: Sequence[Any]) -> Iterator[None]:
    """Context that restores the random states of torch on the CPU and some GPUs, of numpy and of Python."""
    numpy = sys.modules.get("numpy")  # a model that has not imported it cannot draw from it
    numpy_state, python_state = numpy and numpy.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            random.setstate(python_state)


class Attributes:
    """The saved attributes of a module, with the entries of its lists, dictionaries and sets, one level deep."""

    def __init__(self, module: nn.Module) -> None:
        self._table = vars(module)
        self._saved = dict(self._table)
        self._contents = [
            (value, value.copy())
            for name, value in self._saved.items()
            if type(value) in (list, dict, set) and name not in ("_parameters", "_buffers", "_modules")
        ]

    def restore(self) -> None:
        """Restore attributes and entries that were added, removed or replaced."""
        for name in self._table.keys() - self._saved.keys():
            del self._table[name]
        for name, value in self._saved.items():
            if self._table.get(name, self) is not value:
                self._table[name] = value
        for value, content in self._contents:
            if len(value) != len(content) or any(a is not b for a, b in zip(_flat(value), _flat(content), strict=True)):
                value.clear()
                if isinstance(value, list):
                    value.extend(content)
                else:
                    value.update(content)


def silence(module: nn.Module) -> None:
    """Replace ``log`` and ``log_dict`` of a LightningModule, which fail outside of its hooks, by one that does nothing.

    They are attributes of the module then, which :class:`Attributes` removes again.
    """
    if hasattr(type(module), "log_dict"):  # a LightningModule, of either package
        vars(module).update(log=_nothing, log_dict=_nothing)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


def _flat(value: Any) -> Iterator[Any]:
    """Yield the entries of a list or set, or the keys and values of a dictionary in turn."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield entry
    else:
        yield from value


class WrittenParameters(TorchFunctionMode):
    """Mode that copies a parameter before an operation of torch writes to it.

    A forward pass may do so: momentum encoders (He et al. 2020, MoCo), embeddings with ``max_norm``, and layers that
    take their first scale from data write to parameters, outside of the graph.

    Args:
        module: owner of the parameters.

    Cost: a look at the name of each operation.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._by_storage = {_storage(one): one for one in module.parameters()}
        self._by_storage.pop(None, None)
        self._saved: dict[int, tuple[nn.Parameter, Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation unchanged, after a copy of the parameters that it writes to."""
        kwargs = kwargs or {}
        if _writes(getattr(func, "__name__", "")):
            self._save(args[:1])
        if "out" in kwargs:
            self._save(kwargs["out"])
        if _renormalizes(func, args, kwargs):
            self._save((args, kwargs))
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Restore the values of all parameters that were written to."""
        for parameter, content, copy in self._saved.values():
            parameter.data = content
            with torch.no_grad():
                parameter.data.copy_(copy)

    def _save(self, targets: Any) -> None:
        for target in pytree.tree_leaves(targets):
            parameter = self._by_storage.get(_storage(target)) if isinstance(target, Tensor) else None
            if parameter is not None and id(parameter) not in self._saved:
                self._saved[id(parameter)] = parameter, parameter.data, parameter.detach().clone()


_ASSIGNMENTS = frozenset(
    ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__")
)


def _writes(name: str) -> bool:
    """Whether an operation writes to its first argument; by torch's convention its name ends with an underscore."""
    return name in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))


def _renormalizes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is a lookup that first shortens rows of its table (``max_norm``), unseen by a mode."""
    if func not in (F.embedding, F.embedding_bag):
        return False
    return kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None


def _storage(tensor: Tensor) -> int | None:
    """Return the address of a tensor's memory; None if it has none of its own, as a sparse tensor or under vmap."""
    if is_lazy(tensor):
        return None
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def _is_lazy(module: nn.Module) -> bool:
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and is_lazy(tensor) for tensor in own)
