"""Texts of numbers and names in the cells and captions of tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import isfinite

from lightning_normgeo.report.run_settings import MISSING
from lightning_normgeo.report.tables.table import Cell

NOTHING = Cell(MISSING, "")
"""The cell of a missing value."""
_NAMED = 4


def percent(share: float) -> str:
    """Return a share, in [0, 1], as a text in percent."""
    return f"{100 * share:.2f} %"


def points(difference: float, sign: str = "") -> str:
    """Return a difference of shares, in [-1, 1], as a text in percentage points; ``sign`` is "+" to show the sign."""
    return f"{100 * difference:{sign}z.2f} pt"


def interval(low: float, high: float, sign: str = "", least: float = -1.0) -> str:
    """Return an interval of a share as a text in percent; a dash if its ends are not finite.

    Args:
        low: Lower end, as a share.
        high: Upper end; it is shown as 100 % at most.
        sign: "+" to show the signs of positive ends.
        least: Smallest possible share, at which the interval is cut off.
    """
    if not (isfinite(low) and isfinite(high)):
        return f"[{MISSING}]"
    return f"[{100 * max(low, least):{sign}z.2f}, {100 * min(high, 1.0):{sign}z.2f}]"


def named(names: Iterable[str]) -> str:
    """Return names as an enumeration; of more than four the first three, and the number of the others."""
    found = list(names)
    if len(found) <= _NAMED:
        return "; ".join(found)
    return f"{'; '.join(found[: _NAMED - 1])}; and {len(found) - _NAMED + 1} more"


def anchor(*parts: str) -> str:
    """Return the anchor of a table for links: the lowercase words of the parts, joined by hyphens."""
    return "-".join(word for part in parts for word in re.findall(r"[a-z0-9]+", part.lower()))


def sentences(*parts: str) -> str:
    """Return the parts that are not empty as one caption."""
    return " ".join(filter(None, parts))
