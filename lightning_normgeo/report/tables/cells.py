"""How numbers are shown in tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import isfinite

from lightning_normgeo.report.run_settings import MISSING
from lightning_normgeo.report.tables.table import Cell

NOTHING = Cell(MISSING, "")
_NAMED = 4


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.2f} %"


def points(difference: float, sign: str = "") -> str:
    """Return a difference of shares in percentage points."""
    return f"{100 * difference:{sign}z.2f} pt"


def interval(low: float, high: float, sign: str = "", least: float = -1.0) -> str:
    """Return an interval in percent, cut off where no value can be; one that is not known as a dash."""
    if not (isfinite(low) and isfinite(high)):
        return f"[{MISSING}]"
    return f"[{100 * max(low, least):{sign}z.2f}, {100 * min(high, 1.0):{sign}z.2f}]"


def named(names: Iterable[str]) -> str:
    """Return names in a row, all of them only if they are few."""
    found = list(names)
    if len(found) <= _NAMED:
        return "; ".join(found)
    return f"{'; '.join(found[: _NAMED - 1])}; and {len(found) - _NAMED + 1} more"


def anchor(*parts: str) -> str:
    """Return a name for links."""
    return "-".join(word for part in parts for word in re.findall(r"[a-z0-9]+", part.lower()))


def sentences(*parts: str) -> str:
    """Return those that say something as one caption."""
    return " ".join(filter(None, parts))
