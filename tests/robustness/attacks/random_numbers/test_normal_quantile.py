"""Normal numbers of random words: near the exact quantile, normally distributed, and the same bits everywhere."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import kstest, norm

from lightning_normgeo.robustness.attacks.random_numbers import normal_quantile
from lightning_normgeo.robustness.attacks.random_numbers.counter_random import normals
from lightning_normgeo.robustness.attacks.random_numbers.normal_quantile import normals_of
from support import random_twin as twin

TOP = 2**31
SPLIT = int(0.425 * 2**32)
WORDS = {
    "any": torch.randint(-TOP, TOP, (2**19 + 13,), generator=torch.Generator().manual_seed(4)),
    "centre": torch.arange(-(2**17), 2**17 + 1),
    "split": torch.arange(SPLIT - 2**16, SPLIT + 2**16),
    "upper tail": torch.arange(TOP - 2**18, TOP),
    "lower tail": torch.arange(-TOP, -TOP + 2**18),
}


@pytest.mark.parametrize("part", WORDS)
def test_numbers_are_quantiles_to_seven_digits_and_have_the_bits_of_the_twin(part):
    words = WORDS[part].int()
    found = normals_of(words).numpy()
    assert np.array_equal(found, twin.normals(words.numpy()))
    centre = (words.numpy().astype(float) + 0.5) / 2**32
    exact = -np.sign(centre) * ndtri(0.5 - np.abs(centre))
    assert np.abs(found / exact - 1).max() < 5e-7
    assert np.abs(found - exact).max() < 2e-6


def test_numbers_come_in_pairs_of_opposite_sign_up_to_the_largest():
    words = WORDS["any"].int()
    assert torch.equal(normals_of(~words), -normals_of(words))
    ends = normals_of(torch.tensor([-TOP, TOP - 1, -1, 0], dtype=torch.int32)).tolist()
    assert ends == [pytest.approx(x, rel=1e-6) for x in (-6.3379580, 6.3379580, -2.9181e-10, 2.9181e-10)]


def test_bits_do_not_depend_on_length_layout_or_place():
    """Vector instructions take eight or sixteen numbers at a time, and other code takes the rest."""
    words = WORDS["any"].int()[:4099]
    whole = normals_of(words)
    for part in (slice(0, 1), slice(5, 12), slice(1, 4098), slice(None, None, 3), slice(7, None, 1)):
        assert torch.equal(normals_of(words[part]), whole[part])
    grid = words[:4096].view(64, 64)
    assert torch.equal(normals_of(grid.T), whole[:4096].view(64, 64).T)
    assert torch.equal(normals_of(grid[:, ::2]), whole[:4096].view(64, 64)[:, ::2])
    assert normals_of(words[:0]).shape == (0,)


def test_bits_are_those_of_devices_that_compute_both_parts_for_all_numbers():
    words = WORDS["any"].int()
    size = words ^ (words >> 31)
    tails = normal_quantile._tail(size)
    assert np.array_equal(tails.numpy(), twin.tails(size.numpy()))
    assert bool(tails.isfinite().all())
    is_tail = size >= SPLIT
    assert torch.equal(
        torch.where(is_tail, torch.copysign(tails, words), 0), torch.where(is_tail, normals_of(words), 0)
    )


def test_the_default_dtype_changes_nothing():
    words = WORDS["any"].int()[:1000]
    expected = normals_of(words)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(normals_of(words), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_numbers_are_normally_distributed():
    samples, count = 64, 2**15
    x = normals(11, torch.arange(samples), 5, count).double().flatten()
    n = x.numel()
    assert kstest(x.numpy(), "norm").pvalue > 0.01
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float(x.pow(power).mean()) - moment) < 4 * math.sqrt(variance / n)
    for limit in (2.0, 3.0, 4.0, 4.5):
        expected = n * norm.sf(limit)
        for side in (x, -x):
            assert abs(int((side > limit).sum()) - expected) < 4 * math.sqrt(expected)
