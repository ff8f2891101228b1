"""Outputs of batch normalization: radii, collapsed channels, pairs, and the orthogonality gap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    epsilon_over_variance,
    orthogonality_gap,
    pair_gradient,
    radius_reached,
)
from lightning_normgeo.geometry.batches.batch_outputs import COLLAPSED_ABOVE
from support import reference as ref
from support.tensors import draw


@given(st.integers(2, 20), st.floats(1e-12, 1e3), st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_radius_is_that_of_the_outputs(samples: int, eps: float, scale: float, seed: int) -> None:
    y, gamma = scale * draw(samples, 3, seed=seed), draw(3, seed=seed + 1)
    output = F.batch_norm(y, None, None, gamma, training=True, eps=eps)
    reached = radius_reached(y.var(0, correction=0), eps)
    torch.testing.assert_close(output.norm(dim=0), gamma.abs() * samples**0.5 * reached, rtol=1e-9, atol=1e-13)


def test_a_collapsed_channel_is_at_beta_within_one_percent_of_gamma() -> None:
    eps = 1e-5
    variance = torch.tensor([eps / COLLAPSED_ABOVE], dtype=torch.float64)
    assert radius_reached(variance, eps).item() == pytest.approx(0.01, rel=1e-3)
    assert epsilon_over_variance(variance, eps).item() == pytest.approx(COLLAPSED_ABOVE)
    assert epsilon_over_variance(torch.zeros(1), eps).item() == 1e7


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=2),
    st.lists(st.floats(-5, 5), min_size=2, max_size=2),
    st.sampled_from([1e-5, 1e-3, 0.1, 1.0]),
)
def test_gradient_of_a_pair_is_that_of_batch_norm(y: list[float], upstream: list[float], eps: float) -> None:
    pair = torch.tensor(y, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(upstream, dtype=torch.float64)
    (autograd,) = torch.autograd.grad(F.batch_norm(pair[:, None], None, None, training=True, eps=eps)[:, 0], pair, c)
    value = pair_gradient(pair.detach(), c, eps)
    size = c.abs().max().item() / math.sqrt(((y[0] - y[1]) / 2) ** 2 + eps)  # of its two terms, which cancel
    torch.testing.assert_close(value, autograd, rtol=1e-12, atol=1e-12 * size + 1e-300)
    exact = ref.standardize_gradient(y, upstream, eps)
    torch.testing.assert_close(value, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-300)


def gap(rows: list[list[float]]) -> float:
    """The definition, entry by entry."""
    total = sum(ref.dot(row, row) for row in rows)
    entries = [ref.dot(a, b) / total - (i == j) / len(rows) for i, a in enumerate(rows) for j, b in enumerate(rows)]
    return math.sqrt(sum(entry**2 for entry in entries))


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000))
def test_gap_is_its_definition(samples: int, width: int, seed: int) -> None:
    h = draw(samples, width, seed=seed)
    value = orthogonality_gap(h).item()
    assert value == pytest.approx(gap(h.tolist()), rel=1e-10, abs=1e-14)
    assert 0 <= value <= math.sqrt(1 - 1 / samples) + 1e-12
    assert orthogonality_gap(3 * h.reshape(samples, width, 1)).item() == pytest.approx(value, rel=1e-10, abs=1e-14)


def test_gap_of_orthogonal_and_of_parallel_samples() -> None:
    rotated = torch.linalg.qr(draw(9, 9)).Q[:4]
    assert orthogonality_gap(rotated) < 1e-14
    assert orthogonality_gap(draw(1, 9).expand(4, 9)).item() == pytest.approx(math.sqrt(3 / 4))
    assert orthogonality_gap(torch.zeros(3, 2)).isnan()
