"""Optimizers of a run, from its record: whether eq 16 of the paper covers their steps, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_normgeo.runs.records.record import Record

_REASONS = {
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "nesterov": "Nesterov momentum",
    "dampening": "dampening",
}
"""Settings of SGD that eq 16 does not cover, in words."""


def eq16_applies(record: Record) -> bool:
    """Whether eq 16 of the paper applies to measured steps, or may apply, as far as the record tells."""
    applies = record.points("norm_growth/eq16_applies")
    return any(value for _, value in applies) if applies else not _differences(record)


def is_known(record: Record) -> bool:
    """Whether the record tells whether eq 16 applies, by its curve or by the optimizers."""
    return bool(record.points("norm_growth/eq16_applies")) or any(True for _ in _optimizers(record))


def why_not_eq16(record: Record) -> str:
    """Return, in words, the difference between the run's optimizers and plain SGD."""
    return "; ".join(dict.fromkeys(_differences(record))) or "other steps, as clipped or with a large ε"


def _differences(record: Record) -> list[str]:
    """Return, in words, the difference between each of the run's optimizers that has one and plain SGD."""
    reasons = []
    for name, settings in _optimizers(record):
        extra = [f"{word} {_plain(settings[key])}" for key, word in _REASONS.items() if settings.get(key)]
        if name != "SGD":
            reasons.append(name)
        elif extra:
            reasons.append(", ".join(extra))
    return reasons


def weight_decay_of(record: Record) -> float | None:
    """Return the largest weight decay of the run's optimizers; None if the record does not name them."""
    found = [settings.get("weight_decay", 0.0) for _, settings in _optimizers(record)]
    known = [float(one) for one in found if isinstance(one, (int, float))]
    return max(known, default=None) if len(known) == len(found) else None


def other_than_sgd(record: Record) -> str:
    """Return the names of the run's optimizers that are not SGD; empty if all are, or none is known."""
    return ", ".join(dict.fromkeys(name for name, _ in _optimizers(record) if name != "SGD"))


def _optimizers(record: Record) -> Iterator[tuple[str, Mapping[str, Any]]]:
    known = record.observed.get("optimizers")
    for one in known if isinstance(known, list) else []:
        if isinstance(one, Mapping):
            settings = one.get("settings")
            yield str(one.get("class", "")), settings if isinstance(settings, Mapping) else {}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
