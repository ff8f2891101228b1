"""Numbers and counts as verdicts write them: never rounded to the other side of a limit."""

from __future__ import annotations

import math
from collections.abc import Callable

_MOST_DIGITS = 17
"""Digits that tell any two numbers apart."""
_DECIMALS = 6
"""Most decimals of a share in percent that are needed to tell it from 100 %."""
_SIGNIFICANT = 12
"""Decimals of an accuracy beyond which there is rounding alone."""
_LEAST = 1e-300
"""A smaller p-value is written as smaller than this."""


def beside(value: float, limits: tuple[float, ...], written: Callable[[int], str], digits: int) -> str:
    """Return a number with as many digits as put it on the side of each limit on which it is.

    Args:
        value: The number.
        limits: Limits, in the unit in which the number is written.
        written: Returns the number with some digits.
        digits: Fewest digits.
    """
    sides = [_side(value, limit) for limit in limits]
    texts = (written(count) for count in range(digits, _MOST_DIGITS))
    fits = (text for text in texts if [_side(float(text), limit) for limit in limits] == sides)
    return next(fits, written(_MOST_DIGITS))


def scientific(value: float, *limits: float, digits: int = 1) -> str:
    """Return a number such as "3.1e-05", on the side of each limit on which it is."""
    return beside(value, limits, lambda count: f"{value:.{count}e}", digits)


def exactly(limit: float) -> str:
    """Return a limit such as "1e-03" or "1.5e-03", with all digits that it has."""
    return scientific(limit, limit, digits=0)


def significant(value: float, *limits: float, digits: int = 2) -> str:
    """Return a number with a few significant digits and without an exponent if it is large."""
    return beside(value, limits, lambda count: repr(float(f"{value:.{count}g}")).removesuffix(".0"), digits)


def percent(share: float, *limits: float) -> str:
    """Return a share in percent, on the side of each limit and of 100 % on which it is."""
    return f"{significant(_in_percent(share), 100.0, *map(_in_percent, limits))} %"


def nearly_all(share: float, limit: float) -> str:
    """Return a share with as many decimals as tell it from 100 %, at most six, and from a limit."""
    value = _in_percent(share)
    if share < 1 and f"{value:.{_DECIMALS}f}" == f"{100:.{_DECIMALS}f}":
        return f"> {100 - 10**-_DECIMALS:.{_DECIMALS}f} %"
    decimals = 1 if share < 0.99 or share >= 1 else min(_DECIMALS, math.ceil(-math.log10(1 - share)) - 1)
    return f"{beside(value, (_in_percent(limit),), lambda count: f'{value:.{count}f}', decimals)} %"


def points(share: float, *limits: float, sign: str = "") -> str:
    """Return a difference of accuracies in percentage points, on the side of each limit on which it is."""
    value = _in_percent(share)
    found = beside(value, tuple(map(_in_percent, limits)), lambda count: f"{value:{sign}z.{count}f}", 2)
    return f"{found} pt"


def p_value(p: float, level: float, digits: int = 1) -> str:
    """Return a p-value, on the side of the level on which it is."""
    if 0 <= p < _LEAST:
        return f"<{_LEAST:.0e}"
    return beside(p, (level,), lambda count: f"{p:.{count}g}", digits)


def counted(count: int, what: str) -> str:
    """Return a count with its noun, such as "1 pair" or "1,000 pairs"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def too_few(steps: int, needed: int) -> str:
    """Return that a number is made from too few measured steps."""
    return f"{steps} of {needed} needed steps"


def _side(value: float, limit: float) -> int:
    return (value > limit) - (value < limit)


def _in_percent(share: float) -> float:
    """Return a share in percent without the rounding of products and differences, such as 7 for 0.07."""
    return float(f"{100 * share:.{_SIGNIFICANT}g}")
