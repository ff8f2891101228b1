"""Per-unit reductions: the one place where whole weights are read.

A *unit* is a slice of a weight that shares a scaling symmetry: a filter, a group of filters, a whole layer.
Every function of :mod:`lightning_normgeo.geometry` takes weights as a matrix with one unit per row and returns one
float64 value per unit (float32 where the device has no float64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_BLOCK = 2**16
"""Elements per block on a CPU: float64 copies stay in cache; from 1 MiB on each is fresh pages, 8 times slower."""


_WITHOUT_FLOAT64 = {"mps"}
"""Kinds of devices that have no float64."""


def has_float64(device: torch.device) -> bool:
    """Whether statistics on a device can be taken in float64; where not, they are good to about 1e-6."""
    return device.type not in _WITHOUT_FLOAT64


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype statistics are accumulated in: float64, or float32 on devices without it (MPS)."""
    return torch.float64 if has_float64(device) else torch.float32


def as_rows(tensor: Tensor, units: int, dim: int = 0, groups: int = 1) -> Tensor:
    """View a weight as a matrix with one unit per row.

    Args:
        tensor: weight, gradient or optimizer state, of any shape; a complex one counts as pairs of real numbers, as
            optimizers treat it: ‖W‖² = Σ|W_i|², and ⟨W, g⟩ is the real part.
        units: number of units; must divide ``tensor.shape[dim]``, or be 1 for the whole tensor.
        dim: the dimension that enumerates output channels (1 for transposed convolutions).
        groups: of a transposed convolution: its output channels are spread over as many blocks of inputs.

    Returns:
        ``(units, tensor.numel() // units)``; a view where the memory layout allows it.
    """
    tensor = as_real(tensor.detach())
    if groups > 1:
        tensor, dim = tensor.reshape(groups, -1, *tensor.shape[1:]).movedim(2, 1).flatten(0, 1), 0
    return (tensor.movedim(dim, 0) if dim else tensor).reshape(units, -1)


def as_real(tensor: Tensor) -> Tensor:
    """View complex numbers as pairs of real ones along a last dimension of two; real tensors as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row of ``a`` with the same row of ``b``, shape ``(rows,)``."""
    return torch.linalg.vecdot(a, b)  # type: ignore[no-any-return]


def map_rows(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
    """Apply ``function`` to blocks of rows in wide precision and concatenate what it returns.

    Args:
        function: takes one wide ``(block, n)`` tensor per input and returns ``(block,)`` tensors. It must not write
            to its inputs: wide inputs are passed as they are.
        rows: matrices of the same shape, one unit per row.

    Returns:
        What ``function`` returns, for all rows.

    Cost: one pass over the inputs; scratch memory of a few blocks of 512 KiB on a CPU, of one weight on a GPU.
    """
    wide = wide_dtype(rows[0].device)
    return concatenated([function(*(r[block].to(wide) for r in rows)) for block in row_blocks(rows[0])])


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield the rows that are widened at a time: on a CPU few enough to stay in cache, elsewhere all."""
    units, width = matrix.shape
    size = max(1, _BLOCK // max(1, width)) if matrix.device.type == "cpu" else max(1, units)
    return (slice(start, start + size) for start in range(0, max(1, units), size))


def column_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield the columns that are widened at a time, where sums over parts of a row can be put together."""
    width = max(1, matrix.shape[1])
    size = _BLOCK if matrix.device.type == "cpu" else width
    return (slice(start, start + size) for start in range(0, width, size))


def concatenated(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the tensors of blocks of rows as those of all rows."""
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
