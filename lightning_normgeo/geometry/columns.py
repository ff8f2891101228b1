"""Columns with a value for each unit of several weights or layers: numbers repeated, and sums over runs of units."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.rows import on_observing_device


def repeated(values: Sequence[Scalar], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return a column in which each value is repeated as often as its length says, in float64.

    Args:
        values: numbers, or scalars on the device, such as a learning rate that is a tensor.
        lengths: one for each value.
        device: the device of the column, which has float64.

    Returns:
        ``(sum of lengths,)``.

    Cost: one or two kernels for each run of equal values, and no transfer.

    Example:
        >>> repeated([0.5, 0.5, 2.0], [1, 2, 1], torch.device("cpu")).tolist()
        [0.5, 0.5, 0.5, 2.0]
    """
    runs = []
    for _, both in itertools.groupby(zip(values, lengths, strict=True), key=lambda pair: _key(pair[0])):
        run = list(both)
        value, size = run[0][0], (sum(length for _, length in run),)
        if isinstance(value, Tensor):
            runs.append(on_observing_device(value).to(device=device, dtype=torch.float64).expand(size))
        else:  # filled on the device, with the number as a kernel argument: a tensor of the host would be a transfer
            runs.append(torch.full(size, value, dtype=torch.float64, device=device))
    return torch.cat(runs)


def run_sums(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the sums over neighboring rows, as many for each sum as its length says.

    Args:
        values: ``(rows,)`` or ``(rows, columns)``, not on MPS, which lacks the kernel.
        lengths: number of rows of each sum.

    Returns:
        ``(sums,)`` or ``(sums, columns)``.

    Cost: one kernel.

    Example:
        >>> run_sums(torch.tensor([1.0, 2.0, 4.0]), [1, 2]).tolist()
        [1.0, 6.0]
    """
    offsets = table((0, *itertools.accumulate(lengths)), values.device)
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)


@functools.lru_cache(maxsize=256)
def table(integers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return integers as a tensor on a device; cached, since layers rarely change and building it is a transfer."""
    return torch.tensor(integers, device=device)


def _key(value: Scalar) -> float:
    """Return a key that is equal for equal numbers and for the same tensor, whose value is not read."""
    return id(value) if isinstance(value, Tensor) else value
