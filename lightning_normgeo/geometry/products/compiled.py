"""Choice between compiled loops and torch: numba's on a CPU, Triton's on a GPU, and whether they can read and pay."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import warn_once

_T = TypeVar("_T")
_WORTHWHILE = 2**16
"""Total number of elements below which numba or Triton is not even imported: torch takes a millisecond for them."""
_LOOPS = {"cpu": "numba_kernels", "cuda": "triton_launches"}
"""The modules of compiled loops, by the type of the device that they read."""
_DTYPES = {
    "cpu": {torch.float32, torch.float64},
    "cuda": {torch.float32, torch.float64, torch.bfloat16, torch.float16},
}
_TYPES = (Tensor, nn.Parameter)
_failed: set[str] = set()
"""Modules that could not be imported, or whose loops could not be compiled here."""


def fast(run: Callable[[ModuleType], _T], elements: int, loops: str = "numba_kernels") -> _T | None:
    """Run compiled loops; return None where they fail, with one warning, or are missing or not worth importing.

    Args:
        run: function of the module of the loops that calls one of them and returns what it has computed.
        elements: number of elements that the loop would read or write.
        loops: name of the module, a dotted one if it is in another folder.
    """
    if loops in _failed or elements < _WORTHWHILE:
        return None
    try:
        return run(import_module(loops if "." in loops else f"{__package__}.{loops}"))
    except torch.OutOfMemoryError:  # of the device, at this moment
        return None
    except ImportError:  # numba or Triton is not installed; torch computes the same
        _failed.add(loops)
    except Exception as error:  # they cannot be compiled, or do not run
        _failed.add(loops)
        compiler = "Triton" if loops == _LOOPS["cuda"] else "numba"
        warn_once(
            f"What {compiler} compiles fails here ({error!r}), so torch computes it. Numbers are the same; measured "
            "steps take longer.",
            about=f"{compiler} fails",
        )
    return None


def fast_if_used(run: Callable[[ModuleType], _T], loops: str) -> _T | None:
    """Run compiled loops that large weights have already brought in, whatever the size; return None elsewhere."""
    return fast(run, _WORTHWHILE, loops) if f"{__package__}.{loops}" in sys.modules else None


def loop_sums(function: str, items: Sequence[Any], matrices: Sequence[Sequence[Tensor] | None]) -> dict[int, Tensor]:
    """Return the sums that compiled loops have computed, by the position of the item.

    Args:
        function: of the modules of loops, which takes a list of items.
        items: what to read.
        matrices: for each item the matrices that a loop would read or write; None if there is no loop for it.
    """
    chosen: dict[str, list[int]] = defaultdict(list)
    for k, tensors in enumerate(matrices):
        if tensors is not None and readable(tensors):
            chosen[_LOOPS[tensors[0].device.type]].append(k)
    found: dict[int, Tensor] = {}
    for loops, some in chosen.items():
        elements = sum(tensors[0].numel() for k in some if (tensors := matrices[k]) is not None)
        sums = fast(_reader(function, [items[k] for k in some]), elements, loops)
        found.update(zip(some, sums or (), strict=sums is not None))
    return found


def _reader(function: str, items: list[Any]) -> Callable[[ModuleType], list[Tensor]]:
    """Return a function that calls a module's function with items."""
    return lambda module: getattr(module, function)(items)


def readable(tensors: Sequence[Tensor]) -> bool:
    """Whether compiled loops can read matrices: contiguous, of one shape and one device, not empty.

    On a CPU they read float32 and float64, on a GPU also bfloat16 and float16.
    """
    shape, device = tensors[0].shape, tensors[0].device
    dtypes = _DTYPES.get(device.type, ())
    return shape.numel() > 0 and all(
        type(tensor) in _TYPES
        and tensor.device == device
        and tensor.dtype in dtypes
        and tensor.layout == torch.strided
        and tensor.shape == shape
        and tensor.is_contiguous()
        and not tensor.is_neg()
        for tensor in tensors
    )
