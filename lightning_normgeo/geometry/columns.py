"""Columns with a value for each unit of several weights or layers: numbers repeated, and sums over runs of units."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
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

    Cost: one or two kernels for each run of equal values, and no transfer. Columns of numbers are cached, so they must
    not be written to.

    Example:
        >>> repeated([0.5, 0.5, 2.0], [1, 2, 1], torch.device("cpu")).tolist()
        [0.5, 0.5, 0.5, 2.0]
    """
    if any(isinstance(value, Tensor) for value in values):
        return _repeated(values, lengths, device)
    return _repeated_numbers(tuple(values), tuple(lengths), device)


@functools.lru_cache(maxsize=32)
def _repeated_numbers(values: tuple[Scalar, ...], lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return _repeated(values, lengths, device)


def _repeated(values: Sequence[Scalar], lengths: Sequence[int], device: torch.device) -> Tensor:
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
    """Return the sums over neighboring values of each row, as many for each sum as its length says.

    Args:
        values: ``(values,)`` or ``(rows, values)``, on a device that has float64.
        lengths: number of values of each sum.

    Returns:
        ``(sums,)`` or ``(rows, sums)``.

    Cost: one kernel.

    Example:
        >>> run_sums(torch.tensor([1.0, 2.0, 4.0]), [1, 2]).tolist()
        [1.0, 6.0]
    """
    return _reduced(values, tuple(lengths), "sum", np.add)


def run_maxima(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the maxima over neighboring values of each row; NaN where one of them is NaN.

    Args:
        values: ``(values,)`` or ``(rows, values)``, on a device that has float64.
        lengths: number of values of each maximum, at least 1.

    Returns:
        ``(maxima,)`` or ``(rows, maxima)``.

    Cost: one kernel.

    Example:
        >>> run_maxima(torch.tensor([1.0, 4.0, 2.0]), [1, 2]).tolist()
        [1.0, 4.0]
    """
    return _reduced(values, tuple(lengths), "max", np.maximum)


def _reduced(values: Tensor, lengths: tuple[int, ...], name: str, function: np.ufunc) -> Tensor:
    """Reduce runs of values by NumPy on a CPU, which is four to twenty times as fast there, else by torch."""
    if values.is_cpu and lengths and 0 not in lengths:
        return torch.from_numpy(function.reduceat(values.detach().numpy(), _starts(lengths), axis=-1))
    rows = math.prod(values.shape[:-1])
    offsets = table((0, *itertools.accumulate(lengths * rows)), values.device)
    reduced = torch.segment_reduce(values.reshape(-1), name, offsets=offsets, unsafe=True)
    return reduced.view(*values.shape[:-1], len(lengths))


@functools.lru_cache(maxsize=256)
def _starts(lengths: tuple[int, ...]) -> Any:
    return np.array([0, *itertools.accumulate(lengths[:-1])])


@functools.lru_cache(maxsize=256)
def table(integers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return integers as a tensor on a device; cached, since layers rarely change and building it is a transfer."""
    return torch.tensor(integers, device=device)


def _key(value: Scalar) -> float:
    """Return a key that is equal for equal numbers and for the same tensor, whose value is not read."""
    return id(value) if isinstance(value, Tensor) else value
