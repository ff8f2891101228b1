"""Findings as loggers show them: a table, and a few headline values for W&B's summary.

Their keys begin with ``about/``, which is the first section of a run at W&B, since it sorts sections by name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lightning_normgeo.runs.findings.run_findings import findings_of, strongest
from lightning_normgeo.runs.record import ROBUSTNESS, Record

ABOUT = "about"
"""Prefix of the keys."""
TRAINING, KEYS = f"{ABOUT}/training", f"{ABOUT}/keys"
"""Tables of the findings of a training, and of the meanings of keys; that of an evaluation is ``about/robustness``."""
COLUMNS = ["claim", "number", "meaning of the number", "how to judge it"]
"""Columns of a table of findings."""


def findings_rows(record: Record) -> list[list[str]]:
    """Return the rows of the table of findings of a training or an evaluation."""
    diverged = record.diverged
    rows = [] if diverged is None else [["Training", "diverged", str(diverged), ""]]
    return rows + [[one.topic, one.number, one.quantity, one.detail] for one in findings_of(record)]


def headlines(record: Record) -> dict[str, float]:
    """Return the headline values of a training or an evaluation by key, such as ``about/max_abs_cos``.

    Accuracies are those on clean images, and the lowest under noise and under an attack.
    """
    found = {one.headline: one.value for one in findings_of(record) if one.headline and math.isfinite(one.value)}
    for name, results in record.evaluations.items():
        rows = {row.get("attack"): row for row in results.get("results", [])}
        lowest = strongest(replace(record, results={ROBUSTNESS: results}))
        accuracies = {kind: row.get("accuracy") for kind, row in {"clean": rows.get("clean", {}), **lowest}.items()}
        suffix = f"_{name}" if name else ""
        found |= {f"accuracy_{kind.lower()}{suffix}": value for kind, value in accuracies.items() if _is_number(value)}
    return {f"{ABOUT}/{name}": value for name, value in found.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
