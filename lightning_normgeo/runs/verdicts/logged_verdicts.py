"""Verdicts as loggers show them: a table, and a few headline values for W&B's summary.

Their keys begin with ``about/``, which is the first section of a run at W&B, since it sorts sections by name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lightning_normgeo.runs.records.record import ROBUSTNESS, Record
from lightning_normgeo.runs.verdicts.claims.claims import CLAIMS
from lightning_normgeo.runs.verdicts.claims.robustness_claims import strongest
from lightning_normgeo.runs.verdicts.run_verdicts import verdicts
from lightning_normgeo.runs.verdicts.verdict import Verdict
from lightning_normgeo.utilities.attack_names import split_attack

ABOUT = "about"
"""Prefix of the keys."""
TRAINING, KEYS = f"{ABOUT}/training", f"{ABOUT}/keys"
"""Tables of the verdicts on a training, and of the meanings of keys; that of an evaluation is ``about/robustness``."""
OBSERVATION = f"{ABOUT}/observation"
"""Key of the summary of the training's measurements at W&B; see :attr:`Record.observations`."""
COLUMNS = ["claim", "verdict", "number", "threshold", "why", "how to judge it", "evidence"]
"""Columns of a table of verdicts."""


def verdict_rows(record: Record) -> list[list[str]]:
    """Return the rows of the table of verdicts of a training or an evaluation, without claims that have no number."""
    diverged = record.diverged
    rows = [] if diverged is None else [["Training", "diverged", str(diverged), "", "", "", ""]]
    found = {key: one for key, one in verdicts(record).items() if one.evidence}
    return rows + [_row(key, one) for key, one in found.items()]


def _row(key: str, one: Verdict) -> list[str]:
    number = " ".join(filter(None, (one.label, one.number))) if one.number else ""
    return [CLAIMS[key].title, one.word, number, one.limit, one.reason, one.detail, one.evidence]


def headlines(record: Record) -> dict[str, float]:
    """Return the headline values of a training or an evaluation by key, such as ``about/max_abs_cos``.

    Accuracies are the lowest of all test loaders: on clean images, under noise, and under an attack.
    """
    numbers = {CLAIMS[key].headline: one.value for key, one in verdicts(record).items()}
    found = {name: value for name, value in numbers.items() if name and math.isfinite(value)}
    for name, results in record.evaluations.items():
        suffix = f"_{name}" if name else ""
        found |= {f"accuracy_{kind}{suffix}": value for kind, value in _lowest(record, results).items()}
    return {f"{ABOUT}/{name}": value for name, value in found.items()}


def _lowest(record: Record, results: dict[str, Any]) -> dict[str, float]:
    """Return the lowest accuracies of an evaluation, of all test loaders: clean, and under noise and an attack."""
    rows = results.get("results", [])
    clean = [row.get("accuracy") for row in rows if split_attack(str(row.get("attack")))[0] == "clean"]
    found: dict[str, Any] = {"clean": min(filter(_is_number, clean), default=None)}
    for kind, row in strongest(replace(record, results={ROBUSTNESS: results})).items():
        found[kind.lower()] = row["accuracy"]
    return {kind: value for kind, value in found.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
