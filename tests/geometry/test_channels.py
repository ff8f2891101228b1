"""Measures of channels, against direct computations from outputs and against the published code of network slimming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry import (
    ChannelMoments,
    affine_distances,
    clusters,
    input_shares,
    merge_order,
    output_correlations,
    output_cosines,
    rescaling_free_scale,
    slimming_mask,
)
from support.tensors import PROPERTY, draw

FEW = settings(PROPERTY, max_examples=25)


def published_slimming(layers: list[Tensor], percent: float) -> list[Tensor]:
    """The rule of Liu et al.'s prune script, written with its own loop over layers and its own buffer."""
    total = sum(layer.shape[0] for layer in layers)
    bn, index = torch.zeros(total), 0
    for layer in layers:
        size = layer.shape[0]
        bn[index : (index + size)] = layer.abs().clone()
        index += size
    y, _ = torch.sort(bn)
    thre = y[int(total * percent)]
    return [layer.abs().clone().gt(thre) for layer in layers]


@FEW
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 0.999), st.integers(0, 2**16))
def test_slimming_is_the_published_rule(sizes: list[int], ratio: float, seed: int) -> None:
    layers = list(draw(sum(sizes), seed=seed).float().split(sizes))
    found = slimming_mask(torch.cat(layers).abs(), ratio).split(sizes)
    assert all(map(torch.equal, found, published_slimming(layers, ratio)))


def test_of_channels_that_are_alike_slimming_keeps_none() -> None:
    assert not slimming_mask(torch.ones(8), 0.1).any()
    assert int((~slimming_mask(torch.arange(10.0), 0.3)).sum()) == 4  # one more than 0.3 · 10
    assert slimming_mask(torch.zeros(0), 0.3).shape == (0,)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_slimming_refuses_a_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ConfigurationError, match=r"ratio=.* must be in \[0, 1\)"):
        slimming_mask(torch.ones(3), ratio)


@FEW
@given(st.integers(0, 2**16))
def test_the_product_is_free_of_rescalings_and_gamma_is_not(seed: int) -> None:
    gamma, weight = draw(6, seed=seed), draw(9, 6, seed=seed + 1)
    scale = draw(6, seed=seed + 2).exp()
    before = rescaling_free_scale(gamma, weight.norm(dim=0))
    after = rescaling_free_scale(gamma * scale, (weight / scale).norm(dim=0))
    assert torch.allclose(before, after, rtol=1e-12, atol=0)
    assert not torch.allclose(gamma.abs(), (gamma * scale).abs(), rtol=1e-3)
    longer = rescaling_free_scale(gamma, (weight * 10).norm(dim=0))
    assert torch.allclose(longer, 10 * before)  # the scale of the rows, which a normalization behind would remove


@FEW
@given(st.integers(0, 2**16))
def test_shares_are_free_of_rescalings_and_of_the_scale_of_rows(seed: int) -> None:
    gamma, weight = draw(6, seed=seed), draw(9, 6, seed=seed + 1)
    columns, rows = draw(6, seed=seed + 2).exp(), draw(9, 1, seed=seed + 3).exp()
    before = input_shares(weight.square(), gamma.square())
    after = input_shares((rows * weight / columns).square(), (gamma * columns).square())
    assert torch.allclose(before, after, rtol=1e-12, atol=0)
    assert torch.allclose(before.sum(1), torch.ones(9, dtype=torch.float64), rtol=1e-14)
    assert torch.equal(input_shares(weight.square(), 0 * gamma), torch.zeros(9, 6, dtype=torch.float64))


def test_shares_are_those_of_the_variance_for_uncorrelated_channels() -> None:
    gamma, weight = draw(4), draw(5, 4, seed=1)
    normalized = (
        torch.linalg.qr(draw(64, 5, seed=2) - draw(64, 5, seed=2).mean(0)).Q[:, :4] * 8
    )  # variance 1, uncorrelated
    normalized = normalized - normalized.mean(0)
    parts = weight[:, :, None] * (gamma * normalized).T  # (units, channels, samples)
    expected = parts.square().mean(2) / parts.sum(1).square().mean(1, keepdim=True)
    assert torch.allclose(input_shares(weight.square(), gamma.square()), expected, rtol=1e-12)


@FEW
@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 5))
def test_moments_are_those_of_numpy(seed: int, batches: int, channels: int) -> None:
    parts = [draw(5, channels, 3, 2, seed=seed + k) * 3 + 1e4 for k in range(batches)]
    moments = ChannelMoments()
    for part in parts:
        moments.add(part)
    flat = torch.cat(parts).movedim(1, 0).flatten(1).numpy()
    assert moments.count == flat.shape[1]
    np.testing.assert_allclose(moments.variance, flat.var(axis=1), rtol=1e-10)
    np.testing.assert_allclose(moments.correlation, np.corrcoef(flat).reshape(channels, channels), rtol=0, atol=1e-10)


def test_a_constant_channel_is_correlated_with_itself_only() -> None:
    moments = ChannelMoments()
    moments.add(torch.stack([draw(40), torch.full((40,), 3.0, dtype=torch.float64)], 1))
    assert torch.equal(moments.correlation, torch.eye(2, dtype=torch.float64))
    assert float(moments.variance[1]) == 0


def outputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return γ, β, ρ, and the outputs of five channels over 50 samples, ŷ with variance 1."""
    gamma, beta, mixing = draw(5, seed=seed), draw(5, seed=seed + 1), draw(5, 5, seed=seed + 2)
    raw = mixing @ draw(5, 50, seed=seed + 3)
    normalized = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True, correction=0)
    return gamma, beta, normalized @ normalized.T / 50, gamma[:, None] * normalized + beta[:, None]


@FEW
@given(st.integers(0, 2**16))
def test_cosines_and_correlations_are_those_of_the_outputs(seed: int) -> None:
    gamma, beta, correlation, z = outputs(seed)
    size = z.norm(dim=1)
    assert torch.allclose(output_cosines(gamma, beta, correlation), z @ z.T / size / size[:, None], atol=1e-12)
    assert torch.allclose(output_correlations(gamma, correlation), torch.corrcoef(z), atol=1e-12)


@FEW
@given(st.integers(0, 2**16))
def test_similar_gamma_and_beta_leave_the_correlation_to_be_asked(seed: int) -> None:
    """E(z_i − z_j)² = (γ_i − γ_j)² + (β_i − β_j)² + 2γ_iγ_j(1 − ρ_ij)."""
    gamma, beta, correlation, z = outputs(seed)
    expected = (z[:, None] - z).square().mean(2)
    affine = (gamma[:, None] - gamma).square() + (beta[:, None] - beta).square()
    assert torch.allclose(affine + 2 * gamma[:, None] * gamma * (1 - correlation), expected, atol=1e-12)


@FEW
@given(st.integers(0, 2**16))
def test_cosines_are_free_of_rescalings_and_distances_are_not(seed: int) -> None:
    gamma, beta, correlation, _ = outputs(seed)
    scale = draw(5, seed=seed + 4).exp()
    before, after = (output_cosines(gamma * c, beta * c, correlation) for c in (torch.ones_like(scale), scale))
    assert torch.allclose(before, after, rtol=0, atol=1e-12)
    assert not torch.allclose(affine_distances(gamma, beta), affine_distances(gamma * scale, beta * scale), rtol=1e-3)


@FEW
@given(st.integers(0, 2**16))
def test_distances_have_no_sign_of_gamma(seed: int) -> None:
    gamma, beta = draw(5, seed=seed), draw(5, seed=seed + 1)
    found = affine_distances(gamma, beta)
    assert torch.equal(found, affine_distances(-gamma, beta))
    assert torch.equal(found, found.T)
    assert float(found.diagonal().abs().max()) == 0
    assert 0 <= float(found.min()) <= float(found.max()) <= 2
    i, j = 1, 3
    squared = (abs(gamma[i]) - abs(gamma[j])) ** 2 + (beta[i] - beta[j]) ** 2
    mean = (gamma[i] ** 2 + gamma[j] ** 2 + beta[i] ** 2 + beta[j] ** 2) / 2
    assert float(found[i, j]) == pytest.approx(float((squared / mean) ** 0.5), rel=1e-12)


def test_before_training_all_channels_are_close_and_none_need_be_alike() -> None:
    gamma, beta = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    assert float(affine_distances(gamma, beta).max()) == 0
    correlation = torch.eye(4, dtype=torch.float64)
    assert torch.equal(output_cosines(gamma, beta, correlation), correlation)
    assert float(affine_distances(0 * gamma, beta).max()) == 0
    assert float(output_cosines(0 * gamma, beta, correlation).max()) == 0


def naive_merging(dissimilarity: Tensor, importance: Tensor) -> tuple[list[float], list[int]]:
    count = len(importance)
    left, price, partner = set(range(count)), [float("inf")] * count, list(range(count))
    while len(left) > 1:
        cost, i, j = min((float(dissimilarity[i, j]), i, j) for i in left for j in left if i != j)
        gone, stays = (i, j) if importance[i] <= importance[j] else (j, i)
        price[gone], partner[gone] = cost, stays
        left.remove(gone)
    return price, partner


@FEW
@given(st.integers(1, 9), st.integers(0, 2**16))
def test_merging_takes_the_two_most_similar_each_time(count: int, seed: int) -> None:
    matrix = draw(count, count, seed=seed).abs()
    matrix = matrix + matrix.T
    importance = draw(count, seed=seed + 1)
    found = merge_order(matrix, importance)
    price, partner = naive_merging(matrix, importance)
    assert found.price.tolist() == price
    assert found.partner.tolist() == partner
    assert torch.equal(matrix.diagonal(), matrix.T.diagonal())  # the input is left alone


@FEW
@given(st.integers(0, 12), st.integers(0, 2**16))
def test_clusters_are_connected_components(count: int, seed: int) -> None:
    close = draw(count, count, seed=seed) > 1.2
    close = close | close.T
    found = clusters(close).numpy()
    if not count:
        assert found.shape == (0,)
        return
    _, expected = connected_components(close.numpy(), directed=False)
    assert np.array_equal(found[:, None] == found, expected[:, None] == expected)
    assert all(found[k] <= k and found[found[k]] == found[k] for k in range(count))
