"""Per-unit reductions: weights as matrices with one unit per row, read in blocks and summed in float64.

A *unit* is a slice of a weight whose scale leaves the loss unchanged: a filter, a group of filters, a whole layer.
The functions of :mod:`lightning_normgeo.geometry` that reduce weights take them as such a matrix and return one float64
value per unit (float32 where the device has no float64).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_BLOCK = 2**16
"""Elements per block on a CPU: float64 copies of this size stay in cache. Copies of 1 MiB and more get new memory
pages from the operating system each time, which is 8 times slower."""
_DEVICE_BLOCK = 2**20
"""Elements per block on other devices: large enough to be fast; the half dozen float64 copies take 64 MB at most."""


_WITHOUT_FLOAT64 = {"mps"}
"""Device types that have no float64."""


def has_float64(device: torch.device) -> bool:
    """Whether a device has float64."""
    return device.type not in _WITHOUT_FLOAT64


def observing_device(device: torch.device) -> torch.device:
    """Return the device on which tensors of a device are measured: itself, or the CPU if it has no float64 (MPS)."""
    return device if has_float64(device) else torch.device("cpu")


def main_device(tensors: Iterable[Tensor]) -> torch.device:
    """Return the device that holds most elements of some tensors; the CPU without any. Lazy ones have none yet."""
    elements: Counter[torch.device] = Counter()
    for tensor in tensors:
        elements[tensor.device] += 0 if is_lazy(tensor) else tensor.numel()
    return max(elements, key=elements.__getitem__) if elements else torch.device("cpu")


def is_captured() -> bool:
    """Whether CUDA operations are captured in a graph now: nothing is computed, and waiting would break the capture."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def on_observing_device(tensor: Tensor) -> Tensor:
    """Return a tensor as it is measured: itself, or a detached copy on the CPU if its device has no float64 (MPS).

    Everything that is computed from the copy is as exact as on a CPU.
    """
    return tensor if has_float64(tensor.device) else tensor.detach().cpu()


def stored_like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return real values in the dtype of a tensor, rounded before they go to its device, which may have no float64."""
    return values.to(tensor.dtype.to_real()).to(tensor.device)


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over a tensor that stays on its device: float64, or float32 on devices without it (MPS).

    In float32 they have a relative error of about 1e-6. Monitors and probes read :func:`on_observing_device` instead.
    """
    return torch.float64 if has_float64(device) else torch.float32


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, told by its attributes, since importing the class is slow."""
    plain = type(tensor) is nn.Parameter or type(tensor) is Tensor  # asking for attributes takes longer
    return not plain and hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this process holds, without a collective; other tensors unchanged."""
    part: Any = tensor.detach()
    return part.to_local() if is_sharded(part) else part  # type: ignore[no-any-return]


def as_rows(tensor: Tensor, units: int, dim: int = 0, groups: int = 1) -> Tensor:
    """View a weight as a matrix with one unit per row.

    Args:
        tensor: weight, gradient or optimizer state, of any shape; a complex one counts as pairs of real numbers, as
            optimizers treat it: ‖W‖² = Σ|W_i|², and ⟨W, g⟩ is the real part.
        units: number of units; must divide the number of output channels, or be 1 for the whole tensor.
        dim: the dimension that enumerates output channels (1 for transposed convolutions).
        groups: number of groups of a transposed convolution, whose weight ``(in, out/groups, …)`` has a block of rows
            for the output channels of each group.

    Returns:
        ``(units, tensor.numel() // units)``, detached; a view where the memory layout allows it.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, ones = torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.ones(1, 4, 1, 1, dtype=torch.float64)
        >>> output = torch.nn.functional.conv_transpose2d(ones, weight, groups=2)  # six channels, each of its own row
        >>> torch.allclose(as_rows(weight, 6, dim=1, groups=2).sum(1), output.sum((0, 2, 3)))
        True
    """
    tensor = as_real(tensor.detach() if tensor.requires_grad else tensor)
    if groups > 1:
        tensor, dim = tensor.reshape(groups, -1, *tensor.shape[1:]).movedim(2, 1).flatten(0, 1), 0
    return (tensor.movedim(dim, 0) if dim else tensor).reshape(units, -1 if units else 0)


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """Permute the dimensions after the first to the order in which they lie in the memory of another tensor.

    The rows of a weight whose channels come last are then views, and in all tensors that are permuted alike the same
    elements are at the same places of a row.

    Args:
        tensor: of the shape of ``like``.
        like: the weight.

    Example:
        >>> import torch
        >>> weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
        >>> as_rows(in_memory_order(weight, weight), 4).data_ptr() == weight.data_ptr()
        True
    """
    if like.ndim < 3 or like.is_contiguous():
        return tensor
    strides = like.stride()
    order = sorted(range(1, like.ndim), key=lambda d: -strides[d])
    return tensor.permute(0, *order) if like.permute(0, *order).is_contiguous() else tensor


def output_rows(tensor: Tensor) -> int:
    """Return the number of rows along dimension 0 of a weight; 1 for a vector, such as a bias, and an empty tensor."""
    return tensor.shape[0] if tensor.ndim > 1 and tensor.numel() else 1


def as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor as pairs of real numbers along a new last dimension; return a real tensor unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_rows(matrix: Tensor) -> Tensor:
    """View rows of complex numbers as rows of pairs of real numbers; return a real matrix unchanged."""
    return as_real(matrix).flatten(1) if matrix.is_complex() else matrix


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row of ``a`` with the same row of ``b``, shape ``(rows,)``."""
    return torch.linalg.vecdot(a, b)  # type: ignore[no-any-return]


def map_rows(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
    """Apply a function to blocks of rows in float64 (see :func:`wide_dtype`) and concatenate its results.

    Args:
        function: takes one float64 tensor ``(block, n)`` per input and returns tensors ``(block,)``. It must not write
            to its inputs: inputs that are float64 already are passed without a copy.
        rows: matrices of the same shape, one unit per row; a complex number counts as the pair of its parts.

    Returns:
        The results of ``function`` for all rows.

    Cost: one pass over the inputs; scratch memory of a few blocks, of 512 KiB on a CPU and 8 MiB on a GPU.
    """
    rows = tuple(map(real_rows, rows))
    wide = wide_dtype(rows[0].device)
    return concatenated([function(*(r[block].to(wide) for r in rows)) for block in row_blocks(rows[0])])


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices of rows that are converted to float64 together: on a CPU few enough for the cache."""
    units, width = matrix.shape
    size = max(1, _block(matrix.device) // max(1, width))
    return (slice(start, start + size) for start in range(0, max(1, units), size))


def column_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices of columns that are converted to float64 together, for sums that can be added up over columns."""
    width, size = max(1, matrix.shape[1]), _block(matrix.device)
    return (slice(start, start + size) for start in range(0, width, size))


def _block(device: torch.device) -> int:
    return _BLOCK if device.type == "cpu" else _DEVICE_BLOCK


def concatenated(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the results of blocks of rows, each a tuple of tensors ``(block,)``, to those of all rows."""
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
