"""Whether a project has code that may change gradients or weights between a backward pass and the optimizer's step."""

from __future__ import annotations

from typing import Any

from lightning_normgeo._lightning import is_lightnings_own
from lightning_normgeo.callbacks import _monitors

_OF_THE_MODULE = (
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
)
_OF_PRECISION = ("backward", "post_backward", "optimizer_step", "clip_gradients", "_after_closure")
_OF_STRATEGIES = ("backward", "post_backward", "optimizer_step")
_OF_CALLBACKS = ("on_after_backward", "on_before_optimizer_step")
_HARMLESS = ("lightning.pytorch.callbacks.callback", "pytorch_lightning.callbacks.callback")
"""Modules of the empty hooks of Lightning's base class."""


def clips_by_value(trainer: Any) -> bool:
    """Whether Lightning clips gradients by value, that is each element separately."""
    return bool(trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value")


def may_change_gradients(trainer: Any) -> bool:
    """Whether clipping or the user's code may change gradients between a backward pass and the step.

    False means that an optimizer applies exactly the gradients that the backward pass has left.

    Args:
        trainer: in training.
    """
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    return bool(trainer.gradient_clip_val) or scaled or may_change_weights(trainer)


def may_change_weights(trainer: Any) -> bool:
    """Whether the user's code runs between a backward pass and the step, where it may also change weights."""
    module = trainer.lightning_module
    if not module.automatic_optimization:
        return True
    places = (module, _OF_THE_MODULE), (trainer.precision_plugin, _OF_PRECISION), (trainer.strategy, _OF_STRATEGIES)
    if not all(is_lightnings_own(place, hook) for place, hooks in places for hook in hooks):
        return True
    return any(_has_code(callback, hook) for callback in trainer.callbacks for hook in _OF_CALLBACKS)


def may_change_before_backward(trainer: Any) -> bool:
    """Whether there is code of the user's between the monitors' reading and a backward pass that adds to gradients."""
    if not is_lightnings_own(trainer.lightning_module, "on_before_backward"):
        return True
    return any(_has_code(callback, "on_before_backward") for callback in trainer.callbacks)


def compresses_gradients(trainer: Any) -> bool:
    """Whether processes exchange gradients through a communication hook, which may change those of W and γ apart."""
    return getattr(trainer.strategy, "_ddp_comm_hook", None) is not None


def _has_code(callback: Any, hook: str) -> bool:
    """Whether a hook of a callback is neither empty nor of the monitors, which change nothing."""
    method = getattr(callback, hook, None)
    home = str(getattr(method, "__module__", ""))
    return method is not None and home not in _HARMLESS and not home.startswith(f"{_monitors.__name__}.")
