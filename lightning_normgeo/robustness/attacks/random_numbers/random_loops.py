"""Loops that draw Philox's random numbers on a CPU, compiled by numba: the same numbers as torch's, bit by bit.

Unlike the sums of :mod:`lightning_normgeo.geometry.products.numba_kernels` these loops are compiled so that nothing is
reordered or fused. This module is imported by :mod:`.counter_random` only, which draws by torch where it cannot be.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numba import float32, int32, uint32, uint64
from torch import Tensor

from lightning_normgeo.geometry.products.numba_kernels import Kernel, exact_loop, share
from lightning_normgeo.robustness.attacks.random_numbers import normal_quantile as quantile
from lightning_normgeo.robustness.attacks.random_numbers.counter_random import (
    BITS,
    MASK,
    MULTIPLIERS,
    ROUNDS,
    WEYL,
    key_of,
)
from lightning_normgeo.robustness.attacks.random_numbers.ieee_arithmetic import HERON

_PIECE = 2**8
"""Counters whose words are drawn, and made numbers, while they are in cache."""
_CHUNK = 2**7
"""Pieces that a thread draws at a time; fewer are not worth another thread."""


def _constants(values: tuple[float, ...]) -> tuple[Any, ...]:
    return tuple(np.float32(value) for value in values)


_A0, _A1, _A2, _A3 = _constants(quantile.CENTRAL)
_, _B1, _B2, _B3 = _constants(quantile.CENTRAL_BELOW)
_C0, _C1, _C2, _C3 = _constants(quantile.TAIL)
_, _D1, _D2 = _constants(quantile.TAIL_BELOW)
_L0, _L1, _L2, _L3, _L4 = _constants(quantile.LOGARITHM)
_SPLIT, _SPLIT_SQ, _SHIFT, _LOG_2 = _constants((quantile.SPLIT, quantile.SPLIT_SQ, quantile.SHIFT, quantile.LOG_2))
_HERON = HERON[torch.float32]
_HALF, _ONE, _BOTH, _UNIT, _GRID = _constants((0.5, 1.0, 32.0, 2.0**-32, 2.0**-BITS))
_ROOT, _GUESS, _STEPS = np.int32(quantile.SQRT_HALF), np.int32(_HERON.guess), _HERON.steps
_FIRST, _SECOND, _WORD = (np.uint64(value) for value in (*MULTIPLIERS, 32))
_FIRST_KEY, _SECOND_KEY = (np.uint32(value) for value in WEYL)


@exact_loop
def _words(key: Any, counter: Any, start: int, out: Any) -> None:
    """Philox's words of successive counters."""
    key_0, key_1, stream, low, high = key[0], key[1], counter[0], counter[1], counter[2]
    for i in range(out.size // 4):
        a, b, c, d, first, second = uint32(start + i), stream, low, high, key_0, key_1
        for _ in range(ROUNDS):
            p, q = uint64(a) * _FIRST, uint64(c) * _SECOND
            a, b = uint32(uint32(q >> _WORD) ^ b ^ first), uint32(q)
            c, d = uint32(uint32(p >> _WORD) ^ d ^ second), uint32(p)
            first, second = uint32(first + _FIRST_KEY), uint32(second + _SECOND_KEY)
        out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3] = int32(a), int32(b), int32(c), int32(d)


@exact_loop
def _to_uniforms(words: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = float32((words[i] >> int32(32 - BITS)) & int32(2**BITS - 1)) * _GRID


@exact_loop
def _to_normals(words: Any, scratch: Any, out: Any) -> None:
    """The formulas of :func:`.normals_of`, for both parts of the distribution.

    Each loop has one view of the bits only, so that it is compiled to vector instructions.
    """
    n, bits = out.size, scratch.view(np.int32)
    scaled, mantissa, root = scratch[0], scratch[0], scratch[1]
    squares = scratch[2]
    for i in range(n):
        scaled[i] = float32(words[i] ^ (words[i] >> int32(31)) ^ int32(0x7FFFFFFF)) + _HALF
    for i in range(n):
        raised = int32(bits[0, i] - _ROOT)
        bits[0, i], bits[1, i] = int32((raised & int32(0x7FFFFF)) + _ROOT), raised >> int32(23)
    for i in range(n):
        s = (mantissa[i] - _ONE) / (mantissa[i] + _ONE)
        y = s * s
        logarithm = s * ((((_L4 * y + _L3) * y + _L2) * y + _L1) * y + _L0)
        squares[i] = (_BOTH - float32(bits[1, i])) * _LOG_2 - logarithm
    for i in range(n):
        bits[1, i] = int32((bits[2, i] >> int32(1)) + _GUESS)
    for i in range(n):
        r = root[i]
        for _ in range(_STEPS):
            r = (squares[i] / r + r) * _HALF
        r -= _SHIFT
        tail = (((_C3 * r + _C2) * r + _C1) * r + _C0) / ((_D2 * r + _D1) * r + _ONE)
        centre = (float32(words[i] ^ (words[i] >> int32(31))) + _HALF) * _UNIT
        x = _SPLIT_SQ - centre * centre
        above, below = ((_A3 * x + _A2) * x + _A1) * x + _A0, ((_B3 * x + _B2) * x + _B1) * x + _ONE
        size = tail if centre > _SPLIT else centre * (above / below)
        out[i] = -size if words[i] < 0 else size


@exact_loop
def _draw(key: Any, counters: Any, normal: bool, out: Any, begin: int, end: int) -> None:
    """Fill some pieces of the rows of a matrix with normal or uniform numbers."""
    pieces = -(-out.shape[1] // (4 * _PIECE))
    words, scratch = np.empty(4 * _PIECE, np.int32), np.empty((3, 4 * _PIECE), np.float32)
    for k in range(begin, end):
        row, start = k // pieces, k % pieces * _PIECE
        part = out[row, 4 * start : 4 * (start + _PIECE)]
        _words(key, counters[row], start, words[: -(-part.size // 4) * 4])
        if normal:
            _to_normals(words, scratch, part)
        else:
            _to_uniforms(words, part)


def drawn(kind: str, seed: int, samples: Tensor, stream: Tensor | int, count: int) -> Tensor:
    """Return the numbers of :func:`.uniforms` or :func:`.normals`, whose name is ``kind``."""
    out = torch.empty(len(samples), count, dtype=torch.float32)
    streams = torch.as_tensor(stream, dtype=torch.int64).expand(len(samples))
    words = torch.stack([streams & MASK, samples & MASK, (samples >> 32) & MASK], 1).numpy().astype(np.uint32)
    key, normal, numbers = np.array(key_of(seed), np.uint32), kind == "normals", out.numpy()
    total = len(samples) * -(-count // (4 * _PIECE))
    chunks: deque[tuple[Kernel, tuple[Any, ...]]] = deque(
        (_draw, (key, words, normal, numbers, begin, min(begin + _CHUNK, total))) for begin in range(0, total, _CHUNK)
    )
    share(chunks, helpers=min(torch.get_num_threads(), len(chunks)) - 1)
    return out
