"""Counter-based random numbers: the published vectors of Philox, and what makes them useful here."""

import sys

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from lightning_normgeo.geometry.products import compiled
from lightning_normgeo.robustness.attacks.random_numbers import counter_random
from lightning_normgeo.robustness.attacks.random_numbers.counter_random import (
    normals,
    philox,
    sample_numbers,
    uniforms,
    whole_numbers,
)
from support import random_twin as twin

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


# --- the same numbers by every way ------------------------------------------------------------------------------------

LOOPS = "lightning_normgeo.robustness.attacks.random_numbers.random_loops"
KINDS = {"uniforms": (uniforms, twin.uniforms), "normals": (normals, twin.normals)}
SAMPLES = torch.tensor([0, 7, -3, 2**62 + 1, -(2**63)])


def by_torch(draw, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_failed", {LOOPS})
        return draw(*args)


def by_loops(draw, *args):
    """Draw so that only the compiled loops can answer, however few numbers there are."""
    pytest.importorskip("numba")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_WORTHWHILE", 0)
        patch.setattr(compiled, "_failed", set())
        patch.setattr(counter_random, "_drawn", None)
        return draw(*args)


WAYS = pytest.mark.parametrize("way", [by_torch, by_loops])


@WAYS
@pytest.mark.parametrize("seed", [0, 12345, -1, 2**63 + 5, 3**60])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_twin(kind, seed, way):
    draw, numbers_of = KINDS[kind]
    found = way(draw, seed, SAMPLES, 2**28 + 3, 11)
    for row, sample in zip(found, SAMPLES.tolist(), strict=True):
        assert np.array_equal(row.numpy(), numbers_of(twin.words(seed, sample, 2**28 + 3, 11)))


@pytest.mark.parametrize("count", [1, 4, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_loops_and_torch_draw_the_same_bits(kind, count):
    draw, streams = KINDS[kind][0], torch.tensor([0, 1, 2**31, 2**32 - 1, 5])
    expected = by_torch(draw, 9, SAMPLES, streams, count)
    found = by_loops(draw, 9, SAMPLES, streams, count)
    assert found.dtype == expected.dtype == torch.float32
    assert found.is_contiguous()
    assert expected.is_contiguous()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_loops_draw_the_same_numbers_in_any_number_of_threads(kind):
    draw, samples = KINDS[kind][0], torch.arange(40)
    expected, threads = by_torch(draw, 9, samples, 3, 9000), torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(by_loops(draw, 9, samples, 3, 9000), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("counters", [1, 5, 8, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_bound_the_memory_and_change_no_number(kind, counters, monkeypatch):
    draw, sizes = KINDS[kind][0], []
    expected = by_torch(draw, 9, SAMPLES, 3, 41)
    transform = getattr(counter_random, f"{kind}_of")
    monkeypatch.setattr(counter_random, "_COUNTERS", {"cpu": counters})
    monkeypatch.setattr(counter_random, f"{kind}_of", lambda words: sizes.append(words.numel()) or transform(words))
    assert torch.equal(by_torch(draw, 9, SAMPLES, 3, 41), expected)
    assert max(sizes) <= 4 * max(counters, 1)


@WAYS
def test_no_samples_and_no_numbers(way):
    for draw in (uniforms, normals):
        assert way(draw, 1, SAMPLES[:0], 0, 5).shape == (0, 5)
        assert way(draw, 1, SAMPLES, 0, 0).shape == (5, 0)


def test_torch_takes_over_where_loops_cannot_be_compiled(monkeypatch):
    expected = by_torch(normals, 1, SAMPLES, 0, 50)
    monkeypatch.setattr(compiled, "_WORTHWHILE", 0)
    monkeypatch.setattr(compiled, "_failed", set())
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in (LOOPS, "lightning_normgeo.geometry.products.numba_kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
    assert torch.equal(normals(1, SAMPLES, 0, 50), expected)
    assert compiled._failed == {LOOPS}


def test_whole_numbers_are_uniform_in_their_range_and_reach_both_ends():
    found = whole_numbers(3, torch.arange(50), 2, 1000, -3, 4)
    assert found.dtype == torch.int64
    assert sorted(set(found.flatten().tolist())) == list(range(-3, 4))
    assert chisquare(torch.bincount(found.flatten() + 3).numpy()).pvalue > 0.01
    assert torch.equal(whole_numbers(3, torch.arange(7, 8), 2, 10, -3, 4), found[7:8, :10])
    assert int(whole_numbers(3, torch.arange(9), 2, 9, 0, 2**62).max()) > 2**61


def test_numbers_of_samples_may_have_any_size():
    given = [0, -1, 2**63, 2**64 + 5, np.int64(3)]
    assert sample_numbers(given, torch.device("cpu")).tolist() == [0, -1, -(2**63), 5, 3]
    assert sample_numbers(range(3), torch.device("cpu")).tolist() == [0, 1, 2]
    assert sample_numbers(torch.arange(3).int(), torch.device("cpu")).dtype == torch.int64
