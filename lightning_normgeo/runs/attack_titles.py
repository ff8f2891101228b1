"""Titles of attacks: their names with the radius written in words."""

from __future__ import annotations

import re

_NAME = re.compile(r"(?P<attack>.+?)_eps(?P<eps>\d[\d.]*(?:e-?\d+)?)(?P<rest>.*)")
_ROUNDED = 2e-3
"""Largest error of a radius in a name, in steps of 1/255: names have five digits."""


def attack_title(attack: str) -> str:
    """Return a title such as "bim, ε = 2/255" for the name ``bim_eps0.00784``; other names are their own titles."""
    found = _NAME.fullmatch(attack)
    if found is None:
        return attack
    norm = "l2" if "_l2" in attack else "linf"
    return f"{found['attack']}{found['rest']}, ε = {strength(float(found['eps']), norm, _ROUNDED)}"


def strength(value: float, norm: str = "linf", rounded: float = 1e-6) -> str:
    """Return a radius or deviation as text: 8/255 if it is a whole number of steps of pixels with 8 bits.

    Args:
        value: The radius, in pixels between 0 and 1.
        norm: Norm of the radius; one in l2 is never written in steps of single pixels.
        rounded: Largest difference from a whole number of steps.
    """
    steps = 255 * value
    whole = norm != "l2" and steps > 0.5 and abs(steps - round(steps)) < rounded
    return f"{steps:.0f}/255" if whole else f"{value:.4g}"
