"""Draws of foreign code inside the context: each sample has its own numbers, made for the device that was asked for."""

import math

import pytest
import torch
from scipy.stats import kstest

from lightning_normgeo.robustness.attacks.random_numbers.counter_random import normals, uniforms
from lightning_normgeo.robustness.attacks.random_numbers.sample_draws import BatchDrawError, SampleDraws
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import FOREIGN

SAMPLES = [4, 9, 2**62]
X = torch.zeros(3, 2, 5)
DRAWS = {
    "rand": lambda n: torch.rand(n, 2, 5),
    "rand of a size": lambda n: torch.rand(size=(n, 2, 5), dtype=torch.float64),
    "randn": lambda n: torch.randn((n, 2, 5), device="cpu"),
    "rand_like": lambda n: torch.rand_like(X[:n]),
    "randn_like": lambda n: torch.randn_like(X[:n], dtype=torch.float64),
    "randint": lambda n: torch.randint(0, 7, (n, 2, 5)),
    "randint_like": lambda n: torch.randint_like(X[:n], 3, 7),
    "uniform_": lambda n: X[:n].clone().uniform_(-2, 3),
    "normal_": lambda n: X[:n].clone().normal_(1, 2),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_depends_on_the_seed_the_sample_and_its_number_alone(name):
    draw = DRAWS[name]
    with SampleDraws(5, SAMPLES):
        found = [draw(3) for _ in range(3)]
    plain = draw(3)
    for k, sample in enumerate(SAMPLES):
        with SampleDraws(5, [sample]):
            torch.rand(1, 50)  # of another size, which changes no later draw
            again = [draw(1) for _ in range(2)]
        assert torch.equal(torch.cat(again), torch.stack([found[1][k], found[2][k]]))
    assert (found[0].shape, found[0].dtype) == (plain.shape, plain.dtype)
    with SampleDraws(6, SAMPLES):
        assert not torch.equal(draw(3), found[0])
    assert not torch.equal(found[0], found[1])


def test_numbers_are_those_of_native_attacks_with_streams_of_their_own():
    samples = torch.tensor(SAMPLES)
    with SampleDraws(5, SAMPLES):
        first, second, third = torch.rand_like(X), torch.randn(3, 10), X.clone().uniform_(-2, 3)
    assert torch.equal(first.flatten(1), uniforms(5, samples, FOREIGN, 10))
    assert torch.equal(second, normals(5, samples, FOREIGN + 1, 10))
    assert torch.equal(third.flatten(1), 5 * uniforms(5, samples, FOREIGN + 2, 10) - 2)


def test_draws_have_the_distributions_of_torch():
    with SampleDraws(1, range(2000)):
        flat, spread = torch.empty(2000, 8).uniform_(-2, 3), torch.empty(2000, 8).normal_(1, 2)
        whole = torch.randint(3, 7, (2000, 8))
    assert kstest(flat.flatten(), "uniform", (-2, 5)).pvalue > 0.01
    assert kstest(spread.flatten(), "norm", (1, 2)).pvalue > 0.01
    counts = torch.bincount(whole.flatten())
    assert counts[:3].tolist() == [0, 0, 0]
    assert (counts[3:] / 16000 - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 16000)


def test_a_tensor_without_one_entry_per_sample_is_refused_for_several_samples():
    with pytest.raises(BatchDrawError), SampleDraws(5, SAMPLES):
        torch.rand(7)
    with SampleDraws(5, SAMPLES[:1]):
        assert torch.rand(7).shape == (7,)
