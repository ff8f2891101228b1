"""The table of docs/callbacks/channels.md, from the numbers of docs/records/channels.json.

docs/pictures.py writes it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "callbacks" / "channels.md"
RECORD = PAGE.parents[1] / "records" / "channels.json"
_PLACE = re.compile(r"(<!-- channels -->\n).*?(<!-- /channels -->)", re.DOTALL)
_COLUMNS = {
    "\\|γ\\|": "gamma/zero",
    "product": "product/zero",
    "share": "share/zero",
    "share, shuffled": "share_shuffled/zero",
    "similar": "similar/zero",
    "pairs": "pairs/zero",
    "random": "random/zero",
    "pairs, `partner`": "pairs/partner",
}
"""Titles of the columns, and the criterion and replacement of each; 0 unless the title says otherwise."""


def recorded() -> dict[str, Any]:
    """Return the numbers of the run."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8")))


def table() -> str:
    """Return the table of accuracies in percent."""
    data = recorded()
    ratios = sorted({float(name) for curve in data["curves"].values() for name in curve})
    whole = f"{100 * data['clean'][0] / data['clean'][1]:.1f} %"
    lines = [
        "| removed | " + " | ".join(_COLUMNS) + " |",
        "|---" * (1 + len(_COLUMNS)) + "|",
        "| nothing | " + " | ".join([whole] * len(_COLUMNS)) + " |",
    ]
    for ratio in ratios:
        cells = (data["curves"][key][f"{ratio:g}"] for key in _COLUMNS.values())
        shown = (f"{100 * correct / data['clean'][1]:.1f} %" for correct in cells)
        lines.append(f"| {100 * ratio:g} % | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def page() -> str:
    """Return the page with the table of the record."""
    return _PLACE.sub(lambda match: f"{match[1]}{table()}\n{match[2]}", PAGE.read_text(encoding="utf-8"))
