"""Advice in error messages on models and batches that are not understood, in terms of what the user has called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Caller(NamedTuple):
    """The names under which users call an evaluation: the callback, and the function without a Trainer."""

    callback: str
    function: str


ROBUSTNESS = Caller("RobustnessEvaluation", "evaluate_robustness")
CHANNELS = Caller("ChannelEvaluation", "masking")
_caller: ContextVar[Caller] = ContextVar("caller", default=ROBUSTNESS)


@contextmanager
def advising(caller: Caller) -> Iterator[None]:
    """Context in which advice names another evaluation than that of robustness, whose checks it uses."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def callback_name() -> str:
    """Return the name of the callback that evaluates."""
    return _caller.get().callback


def override(*methods: str) -> str:
    """Return advice to override methods of the callback, or to give the function arguments of these names.

    The text ends before the purpose, as in ``f"{override('logits')} to return class logits."``.

    Args:
        methods: ``logits``, ``unpack`` or both.
    """
    callback, function = _caller.get()
    own = " or ".join(f"{callback}.{method}" for method in methods)
    given = " or ".join(f"{function}({method}=…)" for method in methods)
    return f"Override {own}, or give {given},"
