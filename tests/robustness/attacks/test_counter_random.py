"""Counter-based random numbers: the published vectors of Philox, and what makes them useful here."""

import pytest
import torch
from scipy.stats import kstest

from lightning_normgeo.robustness.attacks.counter_random import philox, uniforms

VECTORS = [  # of the authors' library Random123, kat_vectors: counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    found = philox(tuple(torch.tensor([word]) for word in words(counter)), tuple(words(key)))
    assert [int(word) for word in found] == words(expected)


def test_vectors_of_a_batch_are_those_of_each_entry():
    counters = tuple(torch.tensor(column) for column in zip(*(words(c) for c, _, _ in VECTORS), strict=True))
    together = torch.stack(philox(counters, (7, 9)), 1)
    for k in range(3):
        alone = philox(tuple(column[k : k + 1] for column in counters), (7, 9))
        assert together[k].tolist() == [int(word) for word in alone]


def test_a_number_depends_on_seed_sample_and_draw_alone():
    indices, draws = torch.tensor([5, -3, 2**62 + 1, 8]), torch.tensor([0, 4, 4, 2])
    found = uniforms(3, indices, draws, 7)
    assert found.shape == (4, 7)
    order = torch.tensor([2, 0])
    assert torch.equal(uniforms(3, indices[order], draws[order], 7), found[order])
    assert torch.equal(uniforms(3, indices, draws, 3), found[:, :3])
    others = [uniforms(4, indices, draws, 7), uniforms(3, indices + 1, draws, 7), uniforms(3, indices, draws + 1, 7)]
    assert not any(bool((other == found).any()) for other in others)


def test_numbers_are_uniform():
    found = uniforms(1, torch.arange(50), torch.arange(50), 400).flatten()
    assert 0 <= float(found.min()) < 1e-3
    assert 0.999 < float(found.max()) < 1
    assert kstest(found.numpy(), "uniform").pvalue > 0.01
    pairs = torch.corrcoef(uniforms(1, torch.arange(5000), torch.zeros(5000, dtype=torch.long), 4).T)
    assert float((pairs - torch.eye(4)).abs().max()) < 0.05
