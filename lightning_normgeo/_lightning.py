"""One Callback class for both of Lightning's namespaces, ``lightning.pytorch`` and ``pytorch_lightning``.

The two namespaces have distinct Callback classes, and the Trainer and command line of each accept only their own. The
classes here inherit from the Callback of every namespace that can be imported, also of one that is not in use yet, as
it may be later. Importing the second namespace takes a tenth of a second.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_normgeo.errors import warn_once
from lightning_normgeo.utilities.versions import require

_NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
"""In the order of import where neither is in use. Python's typing caches unions regardless of their order, so the
namespace imported second gets ``Union[float, int]`` for its ``Union[int, float]``, and its command line reads
``limit_val_batches: 1`` as the fraction 1.0: all batches."""

BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
"""The hooks that Lightning calls for every training batch."""


def _bases(module: str, kind: str) -> tuple[Any, ...]:
    """Return a class of every namespace, those in use first, so that their hooks win where versions differ."""
    found, errors = [], []
    for name in sorted(_NAMESPACES, key=lambda name: name not in sys.modules):
        try:
            found.append(getattr(importlib.import_module(name + module), kind))
        except Exception as error:  # not installed, or broken, which must not disturb users of the other one
            errors.append(f"{name} ({error!r})")
    if not found:
        raise ImportError(f"PyTorch Lightning cannot be imported: neither {' nor '.join(errors)}.")
    return tuple(found)


require("pytorch-lightning")
if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning.loggers import Logger as Logger
else:
    Callback = type("Callback", _bases("", "Callback"), {"__doc__": "A callback for the Trainer of either namespace."})
    Logger = type("Logger", _bases(".loggers", "Logger"), {})


class QuietCallback(Callback):
    """A callback whose empty per-batch hooks are not called.

    Lightning calls every hook inside a profiler context, which takes about two microseconds even if the hook is empty,
    and skips attributes that are not callable: empty hooks are therefore None on the instance during training. A hook
    that a subclass defines stays, and ``super()`` works in it. Hooks of a callback that is not in the Trainer's list
    stay callable, since another callback may hold it and forward hooks to it.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have empty per-batch hooks skipped."""
        self.skip(trainer, [hook for hook in BATCH_HOOKS if getattr(type(self), hook) is getattr(Callback, hook)])

    def skip(self, trainer: Any, hooks: Iterable[str]) -> None:
        """Have hooks skipped until further notice, if it is Lightning that calls them."""
        direct = any(self is callback for callback in trainer.callbacks)
        for hook in hooks:
            if direct:
                self.__dict__.setdefault(hook, None)
            elif self.__dict__.get(hook, self) is None:  # it was in the list of another Trainer
                del self.__dict__[hook]


def is_wandb(logger: Any) -> bool:
    """Whether a logger is the WandbLogger of either namespace."""
    return any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__)


def hide_charts(logger: Any, keys: Iterable[str]) -> None:
    """Tell a WandbLogger not to draw charts of keys by itself; their values are logged, and can be drawn by hand.

    The keys are named one by one: of two patterns that match a key, W&B takes one at random, and Lightning defines
    ``*`` for the step, which these definitions have to repeat.
    """
    try:
        for key in keys:
            logger.experiment.define_metric(key, step_metric="trainer/global_step", step_sync=True, hidden=True)
    except Exception as error:
        warn_once(f"W&B draws a chart of every key, since it failed to hide some ({error!r}).")


def is_lightnings_own(thing: Any, method: str) -> bool:
    """Whether an object's method is inherited from Lightning, and not overridden by the user."""
    module: str = getattr(type(thing), method).__module__
    return module.startswith(tuple(f"{name}." for name in _NAMESPACES))
