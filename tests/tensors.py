"""Random tensors in float64, a loss of them, and what is close."""

from __future__ import annotations

import torch


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def readout(y, seed=9):
    return ((y + 0.3).tanh() * draw(*y.shape, seed=seed)).sum()


def close(value, expected, tolerance=1e-12):
    """To ``tolerance`` of the largest value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * (1e-30 + expected.abs().max())
