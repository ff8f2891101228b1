"""Rank, kernel and spectrum of Σ_X on data whose covariance is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    PatchMap,
    exact_spectrum,
    input_geometry,
    kernel_fraction,
    participation_ratio,
    probed_spectrum,
)
from support.tensors import draw


def with_eigenvalues(eigenvalues: Tensor, n: int, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return data (samples, n) whose covariance has exactly these eigenvalues, and its eigenvectors as columns."""
    generator = torch.Generator().manual_seed(seed)
    k = len(eigenvalues)
    noise = torch.randn(samples, k, generator=generator, dtype=torch.float64)
    scores = torch.linalg.qr(noise - noise.mean(0)).Q * samples**0.5  # uncorrelated, mean 0, variance 1
    vectors = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    mean = torch.randn(n, generator=generator, dtype=torch.float64)
    return scores * eigenvalues.sqrt() @ vectors.T + mean, vectors


@pytest.mark.parametrize(("n", "samples", "rank"), [(30, 200, 30), (30, 200, 7), (40, 12, 11), (40, 12, 5), (6, 6, 5)])
def test_exact_spectrum_of_a_known_covariance(n: int, samples: int, rank: int) -> None:
    eigenvalues = torch.linspace(3, 0.5, rank, dtype=torch.float64).square()
    x, vectors = with_eigenvalues(eigenvalues, n, samples)
    weight = draw(9, n, seed=5)
    found = input_geometry(x, PatchMap(), weight)
    assert found.exact
    assert (found.rank.item(), found.rank_at_least.item(), found.bound) == (rank, rank, min(n, samples - 1))
    spectrum = found.spectrum
    torch.testing.assert_close(spectrum.eigenvalues[0, :rank], eigenvalues, rtol=1e-10, atol=0)
    assert (spectrum.eigenvalues[0, rank:] < 1e-10).all()
    assert spectrum.trace.item() == pytest.approx(eigenvalues.sum().item(), rel=1e-10)
    expected = (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item()
    assert spectrum.effective_rank.item() == pytest.approx(expected, rel=1e-10)
    assert spectrum.effective_rank_error.item() == spectrum.residuals.max().item() == 0
    inside = (weight @ vectors).square().sum(1)
    torch.testing.assert_close(found.kernel_share, 1 - inside / weight.square().sum(1), rtol=0, atol=1e-10)


@given(st.integers(1, 12), st.integers(2, 14), st.integers(0, 10**6))
def test_agrees_with_a_singular_value_decomposition(n: int, samples: int, seed: int) -> None:
    x, weight = draw(samples, n, seed=seed), draw(4, n, seed=seed + 1)
    found = input_geometry(x, PatchMap(), weight)
    assert found.rank.item() == torch.linalg.matrix_rank(x - x.mean(0)).item()
    torch.testing.assert_close(found.kernel_share, kernel_fraction(weight, x.T), rtol=0, atol=1e-9)


def test_rank_of_float32_data_ignores_its_rounding() -> None:
    x = (draw(500, 20) @ draw(20, 60, seed=1) + 100).float()  # rank 20, and rounding of the size 1e-5
    assert input_geometry(x, PatchMap()).rank.item() == 20
    assert exact_spectrum(x.double().T[None]).rank.item() == 60, "as float64 data its rounding counts"


def test_bfloat16_data_has_a_coarser_rank() -> None:
    x = (draw(500, 20) @ draw(20, 60, seed=1)).bfloat16()
    found = input_geometry(x, PatchMap())
    assert found.rank.item() <= 20
    assert exact_spectrum(x.double().T[None]).rank.item() == 60


def test_constant_inputs_have_rank_zero() -> None:
    found = input_geometry(torch.ones(8, 5, dtype=torch.float64), PatchMap(), draw(3, 5))
    assert (found.rank.item(), found.spectrum.effective_rank.item()) == (0, 0)
    assert found.kernel_share.tolist() == [1, 1, 1]


def test_a_zero_weight_has_no_share() -> None:
    assert input_geometry(draw(3, 5), PatchMap(), torch.zeros(2, 5)).kernel_share.tolist() == [0, 0]


def test_without_a_weight_no_share_is_known() -> None:
    assert input_geometry(draw(3, 5), PatchMap()).kernel_share.isnan().all()


def test_groups_have_a_covariance_each() -> None:
    layer = nn.Conv2d(6, 9, 3, padding=1, groups=3).double()
    patches = PatchMap((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), groups=3)
    x = draw(2, 6, 4, 4)
    x[:, 3] = x[:, 2]  # the second group has two equal channels
    found = input_geometry(x, patches, layer.weight.detach())
    assert found.rank.tolist() == [18, 9, 18]
    alone = PatchMap((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    for group in range(3):
        weight = layer.weight.detach()[3 * group : 3 * group + 3]
        one = input_geometry(x[:, 2 * group : 2 * group + 2], alone, weight)
        torch.testing.assert_close(found.kernel_share[3 * group : 3 * group + 3], one.kernel_share, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.spectrum.effective_rank[group], one.spectrum.effective_rank[0])


SPECTRA = {
    "flat": torch.ones(60, dtype=torch.float64),
    "power law": torch.arange(1, 61, dtype=torch.float64).pow(-1.5),
    "one leads": torch.cat([torch.tensor([1e3], dtype=torch.float64), torch.ones(59, dtype=torch.float64)]),
    "deficient": torch.cat([torch.linspace(2, 1, 25), torch.zeros(35)]).double(),
}


@pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA.keys())
def test_probes_agree_within_three_standard_errors(eigenvalues: Tensor) -> None:
    exact = participation_ratio(eigenvalues.sum(), eigenvalues.square().sum()).item()
    x, _ = with_eigenvalues(eigenvalues, 60, 400)
    z_scores = []
    for seed in range(100):
        found = input_geometry(x, PatchMap(), exact_up_to=4, seed=seed)
        assert not found.exact
        spectrum = found.spectrum
        assert spectrum.trace.item() == pytest.approx(eigenvalues.sum().item(), rel=1e-10)
        z_scores.append((spectrum.effective_rank.item() - exact) / spectrum.effective_rank_error.item())
    z = torch.tensor(z_scores).abs()
    if (eigenvalues > 0).sum() <= 32:  # the subspace has everything, and only rounding is left
        assert spectrum.effective_rank_error < 1e-12 * exact
        assert z.max() < 20
        return
    # Student's t with 15 degrees of freedom has 0.9 % beyond 3, and a root mean square of 1.07
    assert (z < 3).float().mean() >= 0.95
    assert 0.8 < z.square().mean().sqrt() < 1.4, "the standard error is neither too small nor too large"


@pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA.keys())
def test_eigenvalues_from_probes_are_bounds_with_residuals(eigenvalues: Tensor) -> None:
    x, _ = with_eigenvalues(eigenvalues, 60, 400)
    spectrum = input_geometry(x, PatchMap(), exact_up_to=4).spectrum
    true = eigenvalues.sort(descending=True).values
    for k in range(16):
        value, residual = spectrum.eigenvalues[0, k], spectrum.residuals[0, k]
        assert value <= true[k] * (1 + 1e-9) + 1e-12
        assert (true - value).abs().min() <= residual * (1 + 1e-9) + 1e-9
    assert (spectrum.eigenvalues[0].diff() <= 1e-12).all()


def test_more_probes_give_a_smaller_error() -> None:
    x, _ = with_eigenvalues(SPECTRA["power law"], 60, 400)
    few, many = (input_geometry(x, PatchMap(), probes=p, exact_up_to=4).spectrum for p in (4, 32))
    assert many.effective_rank_error < 0.3 * few.effective_rank_error


def test_probes_of_a_convolution_agree_with_its_exact_spectrum() -> None:
    layer = PatchMap((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), groups=2)
    x = F.relu(draw(12, 16, 12, 12)) * torch.linspace(0.2, 2, 16, dtype=torch.float64)[:, None, None]
    exact = input_geometry(x, layer)
    probed = input_geometry(x, layer, exact_up_to=20)
    assert exact.exact
    assert not probed.exact
    several = [input_geometry(x, layer, exact_up_to=20, seed=seed).spectrum for seed in range(20)]
    rank = exact.spectrum.effective_rank
    z = torch.stack([(one.effective_rank - rank) / one.effective_rank_error for one in several]).abs()
    assert (z < 3).float().mean() >= 0.95
    torch.testing.assert_close(probed.spectrum.trace, exact.spectrum.trace, rtol=1e-10, atol=0)
    ratio = probed.spectrum.eigenvalues[:, 0] / exact.spectrum.eigenvalues[:, 0]
    assert (ratio > 0.9).all()


def test_probes_are_the_same_for_each_call_and_leave_random_numbers_alone() -> None:
    x = draw(300, 40)
    before = torch.get_rng_state()
    first, second, other = (input_geometry(x, PatchMap(), exact_up_to=4, seed=seed).spectrum for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.effective_rank, second.effective_rank)
    assert not torch.equal(first.effective_rank, other.effective_rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dead", [0, 3])
def test_a_kernel_found_in_some_columns_is_tested_against_all(dtype: torch.dtype, dead: int) -> None:
    """X has too many columns to be formed, so that some of them have to show the kernel."""
    layer = PatchMap((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    x = F.relu(draw(16, 8, 24, 24)).to(dtype)
    x[:, :dead] = 0
    weight = draw(5, 8, 3, 3, seed=1).to(dtype)
    found = input_geometry(x, layer, weight, exact_up_to=80)
    assert not found.exact
    assert found.rank.item() == found.rank_at_least.item() == 9 * (8 - dead)
    share = weight[:, :dead].double().square().sum((1, 2, 3)) / weight.double().square().sum((1, 2, 3))
    torch.testing.assert_close(found.kernel_share, share, rtol=0, atol=1e-6)


def test_a_direction_outside_of_these_columns_leaves_the_rank_unknown() -> None:
    x = draw(100_000, 30)
    x[:, 0] = 0
    x[17, 0] = 5  # one vector in 100,000
    found = input_geometry(x, PatchMap(), draw(4, 30), exact_up_to=30)
    assert found.rank.isnan().all()
    assert found.rank_at_least.item() == 29
    assert found.kernel_share.isnan().all()


def test_wide_layers_with_many_samples_have_a_lower_bound_only() -> None:
    x = draw(200, 120).float()
    found = input_geometry(x, PatchMap(), draw(4, 120), exact_up_to=50)
    assert found.rank.isnan().all()
    assert 40 < found.rank_at_least.item() <= 49
    assert found.bound == 120


def test_fewer_inputs_than_probes() -> None:
    found = input_geometry(draw(5000, 3), PatchMap(), exact_up_to=2).spectrum
    exact = input_geometry(draw(5000, 3), PatchMap(), exact_up_to=10**3).spectrum
    torch.testing.assert_close(found.effective_rank, exact.effective_rank, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.eigenvalues, exact.eigenvalues, rtol=1e-10, atol=0)


def test_gradients_never_move_the_kernel_part() -> None:
    """100 steps of SGD through batch normalization in training mode, on one batch with fewer vectors than inputs."""
    torch.manual_seed(0)
    layer, norm, head = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Linear(5, 3)
    network = nn.Sequential(layer, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double().train()
    x, y = draw(3, 6, 3, 3), torch.tensor([0, 1, 2])
    patches = PatchMap((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    basis = exact_spectrum(patches.columns(patches.padded(x))).basis[0]
    before = layer.weight.detach().flatten(1).clone()
    found = input_geometry(x, patches, layer.weight.detach())
    assert found.rank.item() == found.bound == 26
    assert found.kernel_share.min() > 0.2
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    moved = layer.weight.detach().flatten(1) - before
    outside = moved - moved @ basis @ basis.T
    assert moved.norm() > 0.1
    assert outside.norm() < 1e-12 * moved.norm() * 100


def test_random_signs_are_unbiased_beside_any_sketch() -> None:
    eigenvalues = SPECTRA["power law"]
    x, _ = with_eigenvalues(eigenvalues, 60, 400)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(1, 4000, 60, generator=generator, dtype=torch.float64).sign()
    spectrum = probed_spectrum(x, PatchMap(), draw(1, 2, 60), signs)
    exact = eigenvalues.square().sum()
    assert (spectrum.square_trace - exact).abs() < 3 * spectrum.square_trace_error < 0.1 * exact
