"""Tables of docs/callbacks/effective_weights.md, from the numbers in docs/records/effective_weights.json.

``docs/generate.py`` writes them between ``<!-- effective: name -->`` and ``<!-- /effective -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE, RECORD = DOCS / "callbacks" / "effective_weights.md", DOCS / "records" / "effective_weights.json"
_PLACE = re.compile(r"(<!-- effective: (\w+) -->\n).*?(<!-- /effective -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """Return the page with up-to-date tables."""
    data = json.loads(RECORD.read_text(encoding="utf-8"))
    tables = {"layers": layers, "correlations": correlations}
    return _PLACE.sub(lambda match: f"{match[1]}{tables[match[2]](data)}\n{match[3]}", text)


def layers(data: Any) -> str:
    """Return the table of some layers, of the first run of each weight decay that was recorded."""
    return "\n".join(
        _markdown(["weight decay", "layer", "‖W‖", "‖W'‖", "σmax(W)", "σmax(W')", "residual"], _layers(data))
    )


def _layers(data: Any) -> Iterator[list[str]]:
    for decay, rows in data["layers"].items():
        for row in rows:
            norms = [row[k] for k in ("weight_norm", "effective_norm", "spectral_norm", "effective_spectral_norm")]
            yield [
                decay,
                f"`{row['layer']}`",
                *(f"{v:.3g}" for v in norms),
                f"{row['effective_spectral_residual']:.1g}",
            ]


def correlations(data: Any) -> str:
    """Return the table of rank correlations, as the report of the study has it."""
    return "\n".join(_markdown(data["table"]["columns"], data["table"]["rows"]))


def _markdown(columns: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
