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
