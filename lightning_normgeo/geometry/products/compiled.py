"""Choice between compiled loops and torch: whether numba's kernels can read given tensors, and whether it pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

_WORTHWHILE = 2**16
"""Total number of elements below which numba is not even imported: torch takes a millisecond for them."""
_usable = True
_TYPES, _DTYPES = (Tensor, nn.Parameter), (torch.float32, torch.float64)


def fast(
    run: Callable[[ModuleType], list[list[Tensor]]], elements: int, loops: str = "numba_kernels"
) -> list[list[Tensor]] | None:
    """Run compiled loops; return None where numba fails or is not worth importing.

    Args:
        run: function of the module of the loops that calls one of them and returns the sums.
        elements: number of elements that the loop would read.
        loops: name of the module.
    """
    global _usable
    if not _usable or elements < _WORTHWHILE:
        return None
    try:
        return run(import_module(f"{__package__}.{loops}"))
    except Exception:  # numba is missing or cannot compile here; torch computes the same
        _usable = False
        return None


def readable(tensors: Sequence[Tensor]) -> bool:
    """Whether compiled loops can read matrices: on a CPU, float32 or float64, contiguous, of one shape, not empty."""
    shape = tensors[0].shape
    return shape.numel() > 0 and all(
        tensor.is_cpu
        and type(tensor) in _TYPES
        and tensor.dtype in _DTYPES
        and tensor.layout == torch.strided
        and tensor.shape == shape
        and tensor.is_contiguous()
        and not tensor.is_neg()
        for tensor in tensors
    )
