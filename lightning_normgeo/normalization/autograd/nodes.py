"""Names, shapes and saved dimensions of autograd nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

_LEAF: Any = torch._C._functions.AccumulateGrad


def is_leaf(node: Any) -> bool:
    """Whether a node is that of a parameter, told by its type: functions written in Python may have any attribute."""
    return type(node) is _LEAF


def name_of(node: Any) -> str:
    """Return the name of a node's operation, such as ``Convolution`` for ``ConvolutionBackward0``.

    A function written in Python keeps its suffix, unless it is torch's own: someone's ``class Mul(Function)`` is not
    known to multiply.
    """
    name: str = node.name()
    if isinstance(node, BackwardCFunction):
        origin = getattr(type(node), "_forward_cls", type(node)).__module__
        if not origin.startswith("torch."):
            return f"{name} of {origin}"
    return name.rstrip("0123456789").removesuffix("Backward")


def shape_of(node: Any, output: int = 0) -> tuple[int, ...]:
    """Return the shape of an output of a node."""
    return tuple(node.variable.shape if is_leaf(node) else node._input_metadata[output].shape)


def dimensions(saved: Any, ndim: int) -> list[int]:
    """Return dimensions that autograd has saved on a node, as numbers from 0 to ``ndim`` - 1.

    Args:
        saved: None or () for all dimensions. Negative dimensions are saved as unsigned 64-bit numbers.
        ndim: number of dimensions of the tensor.
    """
    if ndim == 0:
        return []
    if saved is None:
        listed = list(range(ndim))
    elif isinstance(saved, int):
        listed = [saved]
    else:
        listed = list(saved)
    return [(d - 2**64 if d >= 2**63 else d) % ndim for d in listed] or list(range(ndim))
