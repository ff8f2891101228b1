"""What a figure is, and what all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 400, 250
COLORS = ["#3b6fb6", "#d1603d", "#4c9a6a", "#8d6cab", "#b8923a", "#5f6b7a", "#c0567d", "#3a9ca6"]


@dataclass(frozen=True)
class Figure:
    """One figure: what it shows, how to read it, the chart, and whether it needs the whole width."""

    anchor: str
    title: str
    caption: str
    chart: Any
    wide: bool = False
