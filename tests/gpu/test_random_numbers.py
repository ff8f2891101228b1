"""Random numbers of attacks on a GPU: the bits of a CPU, without a wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_normgeo.geometry.products import compiled
from lightning_normgeo.robustness import Ball, gaussian_noise
from lightning_normgeo.robustness.attacks.random_numbers import counter_random
from lightning_normgeo.robustness.attacks.random_numbers.counter_random import normals, uniforms, whole_numbers
from lightning_normgeo.robustness.attacks.random_numbers.ieee_arithmetic import ordered_lengths, square_root
from lightning_normgeo.robustness.attacks.random_numbers.normal_quantile import normals_of
from lightning_normgeo.robustness.attacks.random_numbers.sample_draws import SampleDraws
from support.gpu import DEVICE, on_gpu

pytestmark = on_gpu
SAMPLES = torch.tensor([0, 7, -3, 2**62 + 1, 12])


def test_every_word_of_the_tails_and_many_others_become_the_same_normal_numbers() -> None:
    top = 2**31
    others = torch.randint(-top, top, (2**24,), generator=torch.Generator().manual_seed(0))
    for words in (others, torch.arange(top - 2**22, top), torch.arange(-(2**20), 2**20)):
        assert torch.equal(normals_of(words.int().to(DEVICE)).cpu(), normals_of(words.int()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_square_roots_and_lengths_have_the_same_bits(dtype: torch.dtype) -> None:
    x = torch.randn(50, 3001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(square_root(x.abs().to(DEVICE)).cpu(), square_root(x.abs()))
    assert torch.equal(ordered_lengths(x.to(DEVICE)).cpu(), ordered_lengths(x))


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("draw", [uniforms, normals])
def test_numbers_have_the_same_bits(draw: Any, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the CPU draws by numba's loops or by torch."""
    monkeypatch.setattr(compiled, "_WORTHWHILE", 0)
    monkeypatch.setattr(compiled, "_failed", set() if loops else {counter_random._LOOPS})
    for count in (1, 5, 4096, 150_529):
        assert torch.equal(draw(3, SAMPLES.to(DEVICE), 9, count).cpu(), draw(3, SAMPLES, 9, count))
    monkeypatch.setattr(counter_random, "_MORE", 1000)
    assert torch.equal(draw(3, SAMPLES.to(DEVICE), 9, 9001).cpu(), draw(3, SAMPLES, 9, 9001))


def test_whole_numbers_are_the_same() -> None:
    assert torch.equal(
        whole_numbers(3, SAMPLES.to(DEVICE), 9, 999, -3, 50).cpu(), whole_numbers(3, SAMPLES, 9, 999, -3, 50)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_has_the_same_bits(dtype: torch.dtype) -> None:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for bounds in (None, (0.0, 1.0)):
        found = gaussian_noise(images.to(DEVICE), 0.05, 3, SAMPLES.tolist(), bounds)
        assert found.device.type == DEVICE
        assert torch.equal(found.cpu(), gaussian_noise(images, 0.05, 3, SAMPLES.tolist(), bounds))


@pytest.mark.parametrize("box_first", [False, True])
@pytest.mark.parametrize("surface", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_random_starts_have_the_same_bits(dtype: torch.dtype, norm: Any, surface: bool, box_first: bool) -> None:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    ball, restarts = Ball(norm, 0.3, 0.0, 1.0, box_first), torch.tensor([0, 3, 1, 0, 9])
    found = ball.sample(images.to(DEVICE), 3, SAMPLES.tolist(), restarts.to(DEVICE), surface)
    assert torch.equal(found.cpu(), ball.sample(images, 3, SAMPLES.tolist(), restarts, surface))


def test_draws_of_foreign_code_have_the_same_bits() -> None:
    with SampleDraws(3, SAMPLES.tolist()):
        there = [torch.rand(5, 3, 8, device=DEVICE), torch.randint(0, 9, (5, 3), device=DEVICE)]
    with SampleDraws(3, SAMPLES.tolist()):
        here = [torch.rand(5, 3, 8), torch.randint(0, 9, (5, 3))]
    assert all(a.device.type == DEVICE and torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))


def test_drawing_does_not_wait_for_the_device() -> None:
    samples, images = SAMPLES.to(DEVICE), torch.rand(5, 3, 32, 32, device=DEVICE)
    restarts = torch.zeros(5, dtype=torch.long, device=DEVICE)
    Ball("l2", 0.3, 0.0, 1.0).sample(images, 3, samples, restarts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gaussian_noise(images, 0.05, 3, samples, (0.0, 1.0))
        Ball("l2", 0.3, 0.0, 1.0).sample(images, 3, samples, restarts)
        Ball("linf", 0.3, 0.0, 1.0).sample(images, 3, samples, restarts, surface=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
