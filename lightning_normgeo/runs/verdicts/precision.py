"""Floating-point precision of a training, and the cosine that counts as zero in it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.thresholds import Thresholds


def cosine_limit(record: Record, thresholds: Thresholds) -> tuple[float, str]:
    """Return the largest |cos(W, ∇W)| that counts as zero in the run's precision, and the precision in words."""
    precision = precision_of(record)
    if precision.startswith("64"):
        return thresholds.cos_double, "float64"
    if precision.startswith("32"):
        return thresholds.cos_single, "float32"
    return thresholds.cos_half, precision


def precision_of(record: Record) -> str:
    """Return the precision of the Trainer, such as "32-true": Lightning's default if the record does not name one."""
    found = record.observed.get("precision")
    if not isinstance(found, str):
        config = record.settings.get("config")
        trainer = config.get("trainer") if isinstance(config, Mapping) else None
        found = trainer.get("precision") if isinstance(trainer, Mapping) else None
    return str(found) if isinstance(found, (str, int)) else "32-true"
