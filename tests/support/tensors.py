"""Random float64 tensors, a loss of them, comparison with tolerance, and strategies for property tests."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
SEED, SIZE, POSITIVE = st.integers(0, 10**6), st.integers(3, 9), st.floats(0.01, 100)
EPS = st.sampled_from([1e-5, 1e-3, 0.1])


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def readout(y, seed=9):
    return ((y + 0.3).tanh() * draw(*y.shape, seed=seed)).sum()


def close(value, expected, tolerance=1e-12):
    """Return whether values agree to ``tolerance`` of the largest value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * (1e-30 + expected.abs().max())
