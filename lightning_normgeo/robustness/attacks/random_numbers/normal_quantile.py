"""Standard normal numbers of random words, by the inverse of the normal distribution function.

Logarithms and trigonometric functions of two devices differ in the last bit. The formulas here consist of float32
operations that have the same bits on every device, see :mod:`.ieee_arithmetic`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.random_numbers.ieee_arithmetic import square_root


def _float32(*values: float) -> tuple[float, ...]:
    """Return values rounded to float32, so that no device rounds them in another way."""
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())


# algorithm AS 241, PPND7; the constant term first
CENTRAL = _float32(3.3871327179, 50.434271938, 159.29113202, 59.109374720)
CENTRAL_BELOW = _float32(1.0, 17.895169469, 78.757757664, 67.187563600)
TAIL = _float32(1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103)
TAIL_BELOW = _float32(1.0, 0.73700164250, 0.12021132975)
SPLIT, SPLIT_SQ, SHIFT = _float32(0.425, 0.180625, 1.6)
# log m = s(2 + 2s²/3 + 2s⁴/5 + …) with s = (m - 1)/(m + 1); the first term left out is below 3e-9 of the sum
LOGARITHM = _float32(2.0, 2 / 3, 2 / 5, 2 / 7, 2 / 9)
(LOG_2,) = _float32(0.6931471805599453)
SQRT_HALF = 0x3F3504F3
"""Bits of √½ in float32."""


def normals_of(words: Tensor) -> Tensor:
    """Return standard normal numbers, float32, one for each random word.

    The number of a word w, an int32, is Φ⁻¹(½ + (w + ½)/2³²), by the formulas of Wichura 1988 (algorithm AS 241, PPND7)
    in float32. Its relative error is below 5e-7. The largest number is 6.34.

    Args:
        words: int32, of any shape.

    Cost: about 60 elementwise operations, and temporaries of eight times the size of ``words``.
    """
    size = words ^ (words >> 31)  # w, or -1 - w if w < 0: positive and negative numbers are mirror images
    centre = size.float().add_(0.5).mul_(2.0**-32)
    numbers = _ratio(SPLIT_SQ - centre * centre, CENTRAL, CENTRAL_BELOW).mul_(centre)
    is_tail = centre > SPLIT
    if words.device.type == "cpu":
        numbers.masked_scatter_(is_tail, _tail(size.masked_select(is_tail)))
    else:  # to choose the tails, 15 % of the numbers, would wait for the device
        numbers = torch.where(is_tail, _tail(size), numbers)
    return torch.copysign(numbers, words)


def _tail(size: Tensor) -> Tensor:
    """Return the number whose probability to be exceeded is p = (2³¹ - size - ½)/2³²: a function of r = √(-log p)."""
    scaled = (size ^ 0x7FFFFFFF).float().add_(0.5)  # 2³² p, of which small values are exact
    bits = scaled.view(torch.int32) - SQRT_HALF
    exponent = (bits >> 23).float()
    mantissa = (bits & 0x7FFFFF).add_(SQRT_HALF).view(torch.float32)  # in [√½, √2)
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    r = square_root((32.0 - exponent).mul_(LOG_2).sub_(_polynomial(s * s, LOGARITHM).mul_(s)))
    return _ratio(r.sub_(SHIFT), TAIL, TAIL_BELOW)


def _ratio(x: Tensor, above: Sequence[float], below: Sequence[float]) -> Tensor:
    return _polynomial(x, above).div_(_polynomial(x, below))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return a polynomial by Horner's rule, given its coefficients from the constant one up."""
    *lower, highest = coefficients
    found = x * highest
    for coefficient in reversed(lower[1:]):
        found.add_(coefficient).mul_(x)
    return found.add_(lower[0])
