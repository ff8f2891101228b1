"""TF32, in which torch computes products of float32 on a CUDA device where its settings allow it: with 11 bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_OFF = "ieee"


def uses_tf32() -> bool:
    """Whether torch may compute convolutions or matrix products of float32 in TF32; by default convolutions."""
    if _has_operators():  # reading allow_tf32 raises if the settings of single operators contradict it
        backends: Any = torch.backends
        operators = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
        return any(one.fp32_precision == "tf32" for one in operators)
    return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32


@contextmanager
def full_float32() -> Iterator[None]:
    """Context without TF32, whose rounding is 5e-4 of each factor; afterwards all settings are as before.

    Newer torch has its settings twice, for all operators and for single ones. Both are set, since torch raises an
    error where somebody reads them and they contradict each other, as ``torch.backends.cudnn.flags`` does in a model.
    """
    with ExitStack() as stack:
        stack.enter_context(_without_warnings())
        for holder, name, _ in reversed(_single_operators()):  # restored last
            stack.callback(setattr, holder, name, getattr(holder, name))
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        try:
            allowed = torch.backends.cudnn.allow_tf32
        except RuntimeError:  # the user has set operators apart, and does not read the common setting
            pass
        else:
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", allowed)
            torch.backends.cudnn.allow_tf32 = False
        for holder, name, off in _single_operators():
            setattr(holder, name, off)
        yield


def _has_operators() -> bool:
    return hasattr(torch.backends.cudnn, "conv")


def _single_operators() -> list[tuple[Any, str, str]]:
    """Return the settings of single operators: the object, the name of its attribute, and the value without TF32.

    That of matrix products on a CPU is among them, since it changes with the setting for all matrix products.
    """
    if not _has_operators():
        return []
    backends: Any = torch.backends
    operators = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul
    return [(one, "fp32_precision", _OFF) for one in operators]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Context in which torch does not warn that a setting will be replaced by another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
