"""Names of attacks in results: their parts, their controls, and titles with the radius in words.

Evaluations make these names, and records, figures and tables read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

RESCALED = "_rescaled"
"""Ending of the names of attacks on the control with rescaled weights."""
_DRAWS = 5
"""Draws of a random model's accuracy on clean images."""
WORST = "worst"
"""Row of the worst case over all attacks with one radius, sample by sample."""
RESERVED = (r"clean(_draw\d)?", f"{WORST}.*", r".*_(eps|std)\d.*", f".*{RESCALED}")
"""Patterns of names that attacks cannot have, since they have a meaning."""
NORM_TITLES = {"linf": "l∞", "l2": "l2"}
"""Titles of norms by their names in settings."""
_DETAIL = re.compile(r"^clean_draw\d|-[a-z]+_s[1-5](_rescaled)?(/|$)")
"""Names of details in tables that have nothing but names."""
_RADIUS = re.compile(r"_eps(\d[\d.]*(?:e-?\d+)?)")
_ROUNDED = 2e-3
"""Largest difference of a radius from a whole number of steps of 1/255: names and settings have a few digits."""


def draws_of_clean() -> list[str]:
    """Return the names of the rows with further draws of a random model's accuracy on clean images."""
    return [f"clean_draw{k}" for k in range(2, _DRAWS + 1)]


def is_detail(row: Mapping[str, Any]) -> bool:
    """Whether a row of results is a detail that overviews leave out: a part of a suite, one corruption, one draw."""
    return bool(row.get("part")) or _DETAIL.search(str(row.get("attack"))) is not None


def split_attack(attack: str) -> tuple[str, str]:
    """Return the name of an attack without its test loader, and the ending for the loader, slash included or empty."""
    name, slash, loader = attack.partition("/")
    return name, slash + loader


def is_control(attack: str) -> bool:
    """Whether an attack is the control of another one, with rescaled weights."""
    return split_attack(attack)[0].endswith(RESCALED)


def control_of(attack: str) -> str:
    """Return the name of the control of an attack, with rescaled weights."""
    name, loader = split_attack(attack)
    return f"{name}{RESCALED}{loader}"


def without_control(attack: str) -> str:
    """Return the name of the attack that a control belongs to; other names stay as they are."""
    name, loader = split_attack(attack)
    return f"{name.removesuffix(RESCALED)}{loader}"


def family(attack: str) -> str:
    """Return the name of an attack without its radius: ``bim_rescaled`` for ``bim_eps0.03_rescaled``."""
    return _RADIUS.sub("", attack)


def norm_of(attack: str) -> str:
    """Return the norm in which the radius of an attack is measured."""
    return "l2" if "_l2" in attack else "l∞"


def attack_title(attack: str) -> str:
    """Return a title such as "bim, ε = 2/255" for the name ``bim_eps0.00784``; other names are their own titles."""
    found = _RADIUS.search(attack)
    return attack if found is None else f"{family(attack)}, ε = {strength(float(found[1]), norm_of(attack))}"


def strength(value: float, norm: str = "l∞") -> str:
    """Return a radius or deviation as text: 8/255 or 0.5/255 if it is a whole number of half steps of 8-bit pixels.

    Numbers of at most two digits stay as they are.

    Args:
        value: The radius, in pixels between 0 and 1.
        norm: Norm of the radius; one in l2 is never written in steps of single pixels.
    """
    steps = 255 * value
    short = float(f"{value:.2g}") == value  # as 0.2, which happens to be 51/255
    halves = 2 * steps
    fits = norm != "l2" and not short and halves > 0.5 and abs(halves - round(halves)) < 2 * _ROUNDED
    return f"{round(halves) / 2:g}/255" if fits else f"{value:.4g}"
