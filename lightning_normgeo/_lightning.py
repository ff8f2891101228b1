"""One Callback class for both of Lightning's namespaces, ``lightning.pytorch`` and ``pytorch_lightning``.

Their Callback classes are distinct objects and each Trainer and command line checks for its own. Ours inherit from
every one that is loaded, or, where none is loaded yet, from every one that is installed.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_NAMESPACES = ("lightning.pytorch", "pytorch_lightning")

BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
"""The hooks that Lightning calls for every training batch."""


def _installed(name: str) -> bool:
    return find_spec(name.partition(".")[0]) is not None


def _callback_bases() -> tuple[Any, ...]:
    loaded = [name for name in _NAMESPACES if name in sys.modules]
    names = loaded or [name for name in _NAMESPACES if _installed(name)]
    return tuple(importlib.import_module(name).Callback for name in names)


if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
else:
    Callback = type("Callback", _callback_bases(), {"__doc__": "A callback for the Trainer of either namespace."})


class QuietCallback(Callback):
    """A callback without empty per-batch hooks.

    Lightning calls a hook inside a profiler context, about two microseconds each, whether it does anything or not, and
    skips what is not callable. A hook that a subclass defines stays, and ``super()`` works in it.
    """

    def __init__(self) -> None:
        super().__init__()
        for hook in BATCH_HOOKS:
            if getattr(type(self), hook) is getattr(Callback, hook):
                self.__dict__[hook] = None


def is_lightnings_own(thing: Any, method: str) -> bool:
    """Whether a module's method is the one it inherits from Lightning, not the user's."""
    module: str = getattr(type(thing), method).__module__
    return module.startswith(tuple(f"{name}." for name in _NAMESPACES))
