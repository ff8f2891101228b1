"""Quantiles of many values, by selection instead of sorting."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

_NEAR_TOP = 64
"""The part of all values, one in so many, up to which the largest ones are selected for a quantile near the top."""


def quantiles(values: Tensor, *levels: float) -> Tensor:
    """Return quantiles of each row, interpolated linearly, which :func:`torch.quantile` gives up to a rounding.

    Args:
        values: ``(rows, n)`` in floating point, n at least 1. A row with a NaN has NaN quantiles.
        levels: each in [0, 1].

    Returns:
        ``(levels, rows)``.

    Cost: a selection in O(n) for levels near 1, and for all levels on a CPU; else one sort.

    Example:
        >>> quantiles(torch.tensor([[4.0, 1.0, 2.0]]), 0.5, 0.75).tolist()
        [[2.0], [3.0]]
    """
    n = values.shape[1]
    places = [_place(level, n) for level in levels]
    count = n - min(below for below, _, _ in places)
    if count * _NEAR_TOP <= n:
        ranked, first = values.topk(count, dim=1).values.flip(1), n - count
    elif values.is_cpu and values.dtype == torch.float64:
        ranks = sorted({k for below, above, _ in places for k in (below, above)})
        ranked, first = torch.from_numpy(np.partition(values.detach().numpy(), ranks)), 0
    else:
        return values.quantile(_on_device(levels, values.dtype, values.device), dim=1)
    found = torch.stack([torch.lerp(ranked[:, a - first], ranked[:, b - first], weight) for a, b, weight in places])
    return torch.where(values.amax(1).isnan(), torch.nan, found)


def quantile_of_some(sizes: Tensor, chosen: Tensor, level: float) -> Tensor:
    """Return the quantile of the chosen sizes, interpolated linearly; NaN if there are none, or if one is not finite.

    How many are chosen may be known to the device alone, which is not waited for.

    Args:
        sizes: ``(n,)`` in floating point, n at least 1; none is negative.
        chosen: ``(n,)``, boolean.
        level: in [0, 1].

    Cost: a selection of the sizes above the quantile of all, and a dozen operations on them.

    Example:
        >>> quantile_of_some(torch.tensor([4.0, 1.0, 2.0, 9.0]), torch.tensor([True, True, True, False]), 0.75).item()
        3.0
    """
    count = len(sizes) - _place(level, len(sizes))[0]  # enough, since of fewer sizes fewer are above the quantile
    largest = torch.where(chosen, sizes, 0.0).topk(count).values
    number = chosen.sum(dtype=sizes.dtype)
    rank = (number - 1) * (1 - level)  # from the top, between two of them
    weights = 1 - (torch.arange(count, dtype=sizes.dtype, device=sizes.device) - rank).abs()
    return torch.dot(largest, weights.clamp_min(0)) / (number > 0)


def _place(level: float, n: int) -> tuple[int, int, float]:
    """Return the ranks of the values on both sides of a quantile, and the weight of the upper one."""
    rank = level * (n - 1)
    below = math.floor(rank)
    return below, math.ceil(rank), rank - below


@functools.lru_cache(maxsize=16)
def _on_device(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return levels on a device; cached, since building them is a transfer."""
    return torch.tensor(levels, dtype=dtype, device=device)
