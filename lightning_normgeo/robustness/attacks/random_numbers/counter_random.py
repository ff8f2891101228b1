"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011) on tensors.

A number depends on its key and its counter alone, so that samples can be drawn in any order, in batches of any size and
on every device, with the same numbers. The key is the seed; the counter is the position among the sample's numbers, the
stream, and the sample's number in two words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_normgeo.geometry.products.compiled import fast
from lightning_normgeo.robustness.attacks.random_numbers.normal_quantile import normals_of

GENERATOR = "philox4x32-10"
"""Name of the generator, as results give it."""
DRAWS = 1
"""Version of how numbers are made of the generator's words. Raise it when that changes: evaluations do not resume with
other draws."""
MASK = 0xFFFFFFFF
BITS = 24
"""Bits of a uniform number, as many as float32 has."""
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
_COUNTERS = {"cpu": 2**15}
"""Counters of one block, by the type of the device: on a CPU its temporaries stay in cache."""
_MORE = 2**20
"""Counters of one block on other devices, where a block is not worth its launches if it is small."""
_LOOPS = "lightning_normgeo.robustness.attacks.random_numbers.random_loops"


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four words of 32 random bits for each counter, as int64 tensors.

    Args:
        counter: four words of 32 bits each, as int64 tensors that can be broadcast to one shape.
        key: two words of 32 bits.
    """
    a, b, c, d = (word.clone(memory_format=torch.contiguous_format) for word in torch.broadcast_tensors(*counter))  # type: ignore[no-untyped-call]
    low, high = torch.empty_like(a), torch.empty_like(a)
    first, second = key
    for _ in range(ROUNDS):
        # products wrap around to the right 64 bits; their upper halves are read as if they had no sign, and their lower
        # halves become the words b and d, whose upper bits the masks of the next round remove
        torch.mul(a, MULTIPLIERS[0], out=low)
        torch.mul(c, MULTIPLIERS[1], out=high)
        torch.bitwise_right_shift(high, 32, out=a).bitwise_xor_(b).bitwise_xor_(first).bitwise_and_(MASK)
        torch.bitwise_right_shift(low, 32, out=c).bitwise_xor_(d).bitwise_xor_(second).bitwise_and_(MASK)
        b, d, low, high = high, low, d, b
        first, second = (first + WEYL[0]) & MASK, (second + WEYL[1]) & MASK
    return a, b.bitwise_and_(MASK), c, d.bitwise_and_(MASK)


def uniforms(seed: int, samples: Tensor, stream: Tensor | int, count: int) -> Tensor:
    """Return uniform random numbers in [0, 1) for each sample, float32 of shape ``(batch, count)``.

    They are multiples of 2⁻²⁴.

    Args:
        seed: seed of the evaluation.
        samples: ``(batch,)`` int64, a number for each sample, on the device of the result.
        stream: number of the draw, below 2^32; one number, or ``(batch,)`` int64.
        count: numbers for each sample, at most 4·2^32.

    Cost: see :func:`normals`.
    """
    return _numbers("uniforms", uniforms_of, seed, samples, stream, count)


def normals(seed: int, samples: Tensor, stream: Tensor | int, count: int) -> Tensor:
    """Return standard normal random numbers for each sample, float32 of shape ``(batch, count)``.

    Each is made of one word, see :func:`.normals_of`, with the same bits on every device with the arithmetic of IEEE
    754.

    Args:
        seed: seed of the evaluation.
        samples: ``(batch,)`` int64, a number for each sample, on the device of the result.
        stream: number of the draw, below 2^32; one number, or ``(batch,)`` int64.
        count: numbers for each sample, at most 4·2^32.

    Cost: on a CPU 3 ns for each number by numba's loops, where numba is installed and there are many numbers, otherwise
    20 ns; on a GPU some 200 operations for each 4 million numbers. Temporaries do not grow with the result.
    """
    return _numbers("normals", normals_of, seed, samples, stream, count)


def whole_numbers(seed: int, samples: Tensor, stream: Tensor | int, count: int, low: int, high: int) -> Tensor:
    """Return random integers from ``low`` up to ``high`` - 1 for each sample, int64 of shape ``(batch, count)``.

    Each is the remainder of 63 random bits.
    """
    words = _drawn(lambda words: words, torch.int32, seed, samples, stream, 2 * count).long()
    bits: Tensor = ((words[:, ::2] & (MASK >> 1)) << 32) | (words[:, 1::2] & MASK)
    return bits % (high - low) + low


def uniforms_of(words: Tensor) -> Tensor:
    """Return uniform random numbers in [0, 1), float32, one for each int32 word."""
    bits: Tensor = (words >> (32 - BITS)) & (2**BITS - 1)
    return bits.float().mul_(2.0**-BITS)


def sample_numbers(indices: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Return the numbers of samples as an int64 tensor on a device; larger numbers are taken modulo 2^64."""
    if isinstance(indices, Tensor):
        return indices.to(device, torch.int64)
    return torch.tensor([(int(index) + 2**63) % 2**64 - 2**63 for index in indices], dtype=torch.int64, device=device)


def key_of(seed: int) -> tuple[int, int]:
    """Return the two words of the key of a seed."""
    return seed & MASK, (seed >> 32) & MASK


def _numbers(
    kind: str, transform: Callable[[Tensor], Tensor], seed: int, samples: Tensor, stream: Tensor | int, count: int
) -> Tensor:
    """Return random numbers by compiled loops where they pay, or else by torch: the same ones."""
    if samples.device.type == "cpu":
        found: Tensor | None = fast(
            lambda loops: loops.drawn(kind, seed, samples, stream, count), len(samples) * count, loops=_LOOPS
        )
        if found is not None:
            return found
    return _drawn(transform, torch.float32, seed, samples, stream, count)


def _drawn(
    transform: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    seed: int,
    samples: Tensor,
    stream: Tensor | int,
    count: int,
) -> Tensor:
    """Return numbers made of the words of each sample, block by block."""
    counters, device = -(-count // 4), samples.device
    drawn = torch.empty(len(samples), 4 * counters, dtype=dtype, device=device)
    at_once = _COUNTERS.get(device.type, _MORE)
    streams = stream if isinstance(stream, Tensor) else torch.full_like(samples, stream)  # no transfer of a number
    rows = max(1, at_once // max(1, counters))
    for row in range(0, len(samples), rows):
        some, draw = (column[row : row + rows, None] for column in (samples, streams))
        for start in range(0, counters, at_once):
            places = torch.arange(start, min(start + at_once, counters), device=device)
            found = philox((places, draw & MASK, some & MASK, (some >> 32) & MASK), key_of(seed))
            words = torch.empty(*found[0].shape, 4, dtype=torch.int32, device=device)
            for k, word in enumerate(found):
                words[..., k] = word
            drawn[row : row + rows, 4 * start : 4 * (start + len(places))] = transform(words.flatten(1))
    return drawn[:, :count].contiguous()
