"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011) on tensors.

A number depends on its key and its counter alone, so that samples can be drawn in any order, in batches of any size and
on every device, with the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_MASK = 0xFFFFFFFF
_BITS = 24
"""Bits of a uniform number, as many as float32 has."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four words of 32 random bits for each counter, as int64 tensors.

    Args:
        counter: four words of 32 bits each, as int64 tensors of one shape.
        key: two words of 32 bits.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(_ROUNDS):
        # products wrap around to the right 64 bits; the upper half is read as if it had no sign
        low, high = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = ((high >> 32) & _MASK) ^ b ^ first, high & _MASK, ((low >> 32) & _MASK) ^ d ^ second, low & _MASK
        first, second = (first + _WEYL[0]) & _MASK, (second + _WEYL[1]) & _MASK
    return a, b, c, d


def uniforms(seed: int, indices: Tensor, stream: Tensor, count: int) -> Tensor:
    """Return uniform random numbers in [0, 1) for each sample, float32 of shape ``(batch, count)``.

    Args:
        seed: seed of the evaluation.
        indices: ``(batch,)`` int64, a number for each sample.
        stream: ``(batch,)`` int64 below 2^32, the number of the draw of each sample.
        count: numbers for each sample, at most 4·2^32.
    """
    blocks = torch.arange(-(-count // 4), device=indices.device)
    shape = len(indices), len(blocks)
    low, high, draw = (
        word.expand(shape) for word in ((indices & _MASK)[:, None], ((indices >> 32) & _MASK)[:, None], stream[:, None])
    )
    words = philox((blocks.expand(shape), draw, low, high), (seed & _MASK, (seed >> 32) & _MASK))
    bits = torch.stack(words, dim=2).flatten(1)[:, :count]
    return (bits >> (32 - _BITS)).float() * 2.0**-_BITS
