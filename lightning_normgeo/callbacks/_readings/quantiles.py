"""Quantiles of many values, by selection on a CPU instead of sorting."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor


def quantiles(values: Tensor, *levels: float) -> Tensor:
    """Return quantiles of each row, interpolated linearly, which :func:`torch.quantile` gives up to a rounding.

    Args:
        values: ``(rows, n)`` in floating point, n at least 1. A row with a NaN has NaN quantiles.
        levels: each in [0, 1].

    Returns:
        ``(levels, rows)``.

    Cost: on a CPU selection in O(n), a twentieth of a sort for one level near the end; else one sort.

    Example:
        >>> quantiles(torch.tensor([[4.0, 1.0, 2.0]]), 0.5, 0.75).tolist()
        [[2.0], [3.0]]
    """
    if not values.is_cpu or values.dtype != torch.float64:
        return values.quantile(_on_device(levels, values.dtype, values.device), dim=1)
    places = [_place(level, values.shape[1]) for level in levels]
    array = values.detach().numpy()
    selected = torch.from_numpy(np.partition(array, sorted({k for below, above, _ in places for k in (below, above)})))
    found = torch.stack([torch.lerp(selected[:, below], selected[:, above], weight) for below, above, weight in places])
    return torch.where(values.isnan().any(1), torch.nan, found)


def _place(level: float, n: int) -> tuple[int, int, float]:
    """Return the ranks of the values on both sides of a quantile, and the weight of the upper one."""
    rank = level * (n - 1)
    below = math.floor(rank)
    return below, math.ceil(rank), rank - below


@functools.lru_cache(maxsize=16)
def _on_device(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return levels on a device; cached, since building them is a transfer."""
    return torch.tensor(levels, dtype=dtype, device=device)
