"""Random numbers as any device should make them: Philox in Python's integers, normals in numpy's float32, one operation
after another."""

from __future__ import annotations

import numpy as np

F = np.float32
MASK = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Four words of 32 bits, as in the paper of Salmon et al. 2011."""
    (a, b, c, d), (first, second) = counter, key
    for _ in range(10):
        low, high = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (high >> 32) ^ b ^ first, high & MASK, (low >> 32) ^ d ^ second, low & MASK
        first, second = (first + 0x9E3779B9) & MASK, (second + 0xBB67AE85) & MASK
    return [a, b, c, d]


def words(seed: int, sample: int, stream: int, count: int) -> np.ndarray:
    """The first words of a sample's stream, as int32."""
    found: list[int] = []
    for block in range(-(-count // 4)):
        found += philox([block, stream, sample & MASK, (sample >> 32) & MASK], [seed & MASK, (seed >> 32) & MASK])
    return np.array(found[:count], np.uint32).view(np.int32)


def uniforms(words: np.ndarray) -> np.ndarray:
    return (words.view(np.uint32) >> 8).astype(F) * F(2.0**-24)


def square_root(x: np.ndarray) -> np.ndarray:
    bits, guess, steps = (np.int32, 0x1FBD1DF5, 3) if x.dtype == F else (np.int64, 0x1FF7A3BEA91D9B1B, 4)
    root = ((x.view(bits) >> bits(1)) + bits(guess)).view(x.dtype)
    for _ in range(steps):
        root = (x / root + root) * x.dtype.type(0.5)
    return root


def normals(words: np.ndarray) -> np.ndarray:
    """Algorithm AS 241, PPND7, with the logarithm as a series."""
    size = words ^ (words >> np.int32(31))
    centre = (size.astype(F) + F(0.5)) * F(2.0**-32)
    x = F(0.180625) - centre * centre
    above = ((F(59.109374720) * x + F(159.29113202)) * x + F(50.434271938)) * x + F(3.3871327179)
    below = ((F(67.187563600) * x + F(78.757757664)) * x + F(17.895169469)) * x + F(1)
    central = centre * (above / below)
    found = np.where(centre > F(0.425), tails(size), central)
    return np.where(words < 0, -found, found)


def tails(size: np.ndarray) -> np.ndarray:
    scaled = (size ^ np.int32(0x7FFFFFFF)).astype(F) + F(0.5)
    bits = scaled.view(np.int32) - np.int32(0x3F3504F3)
    mantissa = ((bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)).view(F)
    s = (mantissa - F(1)) / (mantissa + F(1))
    y = s * s
    series = s * ((((F(2 / 9) * y + F(2 / 7)) * y + F(2 / 5)) * y + F(2 / 3)) * y + F(2))
    r = square_root((F(32) - (bits >> np.int32(23)).astype(F)) * F(np.log(2.0)) - series) - F(1.6)
    above = ((F(0.17023821103) * r + F(1.3067284816)) * r + F(2.7568153900)) * r + F(1.4234372777)
    return above / ((F(0.12021132975) * r + F(0.73700164250)) * r + F(1))


def length(vector: np.ndarray) -> np.ndarray:
    """The l2 norm of one vector, with squares added half to half."""
    squares = list(vector * vector)
    while len(squares) > 1:
        half = (len(squares) + 1) // 2
        rest = len(squares) - half
        squares = [squares[k] + squares[half + k] if k < rest else squares[k] for k in range(half)]
    return square_root(np.array(squares, vector.dtype))[0]
