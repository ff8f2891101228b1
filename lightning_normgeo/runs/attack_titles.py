"""Titles of attacks: their names with the radius written in words."""

from __future__ import annotations

import re

_NAME = re.compile(r"(?P<attack>.+?)_eps(?P<eps>\d[\d.]*(?:e-?\d+)?)(?P<rest>.*)")
_ROUNDED = 2e-3
"""Largest difference of a radius from a whole number of steps of 1/255: names and settings have a few digits."""


def attack_title(attack: str) -> str:
    """Return a title such as "bim, ε = 2/255" for the name ``bim_eps0.00784``; other names are their own titles."""
    found = _NAME.fullmatch(attack)
    if found is None:
        return attack
    norm = "l2" if "_l2" in attack else "linf"
    return f"{found['attack']}{found['rest']}, ε = {strength(float(found['eps']), norm)}"


def strength(value: float, norm: str = "linf") -> str:
    """Return a radius or deviation as text: 8/255 if it is a whole number of steps of pixels with 8 bits.

    Numbers of at most two digits stay as they are.

    Args:
        value: The radius, in pixels between 0 and 1.
        norm: Norm of the radius; one in l2 is never written in steps of single pixels.
    """
    steps = 255 * value
    short = float(f"{value:.2g}") == value  # as 0.2, which happens to be 51/255
    whole = norm != "l2" and not short and steps > 0.5 and abs(steps - round(steps)) < _ROUNDED
    return f"{steps:.0f}/255" if whole else f"{value:.4g}"
