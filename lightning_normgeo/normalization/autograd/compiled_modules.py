"""Modules that torch.compile was applied to, and those that call compiled functions: their autograd graph is opaque."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from lightning_normgeo.errors import ConfigurationError

_LIBRARIES = ("torch", "torchvision", "torchmetrics", "lightning", "pytorch_lightning", "builtins")
"""Packages whose classes call no compiled functions by themselves."""
_ELEMENTS = 64
"""Number of elements of a list or dictionary that are looked at: it may be a whole data set."""


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a module, to a submodule, or to the LightningModule itself."""
    if getattr(module, "_compiler_ctx", None) is not None:  # Lightning's mark: it compiles the methods of the module
        return True
    # ``module.compile()`` sets the attribute, ``torch.compile(module)`` returns a wrapper of this class; it is compared
    # by name, since importing it loads all of the compiler
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or type(child).__name__ == "OptimizedModule"
        for child in module.modules()
    )


def runs_compiled_code(module: nn.Module) -> bool:
    """Whether a training of a module may run compiled code: :func:`is_compiled`, or it calls compiled functions.

    Such functions are attributes of a module, also in short lists and dictionaries, methods of its class, and functions
    that these methods call by a global name. Others, as those in closures, are not found.
    """
    if is_compiled(module):
        return True
    kinds: set[type] = set()
    for child in module.modules():
        if any(map(_is_compiled_function, _flat(vars(child).values()))):
            return True
        kinds.update(type(child).__mro__)
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in _LIBRARIES]
    return any(_is_compiled_function(called) for kind in own for called in _called_by(kind))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values and the elements of lists, tuples and dictionaries among them."""
    for value in values:
        if isinstance(value, dict):
            yield from islice(value.values(), _ELEMENTS)
        elif isinstance(value, (list, tuple)):
            yield from islice(value, _ELEMENTS)
        else:
            yield value


def _called_by(kind: type) -> Iterator[Any]:
    """Yield the methods of a class, and everything that their code calls by a global name."""
    for value in vars(kind).values():
        method = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        yield method
        if isinstance(method, FunctionType):
            for name in method.__code__.co_names:
                yield method.__globals__.get(name)


def _is_compiled_function(value: Any) -> bool:
    """Whether ``torch.compile`` has made a function; ``torch.compiler.disable`` leaves the same mark and one more."""
    function = value.__func__ if isinstance(value, MethodType) else value
    if not isinstance(function, FunctionType):
        return False
    marks = vars(function)
    return "_torchdynamo_orig_callable" in marks and not marks.get("_torchdynamo_disable", False)


def check_not_compiled(function: str, module: nn.Module) -> None:
    """Check that a function can read the graph of a module.

    Args:
        function: its name.
        module: the module that it was given.

    Raises:
        ConfigurationError: for a compiled module.
    """
    if is_compiled(module):
        raise ConfigurationError(f"{function} cannot look into a compiled model. Give it the model itself.")
