"""Whether eq 16 of the paper covers the optimizer steps of a run, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_normgeo.runs.record import Record

_REASONS = {
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "nesterov": "Nesterov momentum",
    "dampening": "dampening",
}
"""Settings of SGD that eq 16 does not cover, in words."""


def eq16_applies(record: Record) -> bool:
    """Whether eq 16 of the paper applies to the measured steps; True if the record does not say so."""
    applies = record.points("norm_growth/eq16_applies")
    return not applies or any(value for _, value in applies)


def why_not_eq16(record: Record) -> str:
    """Return, in words, the difference between the run's optimizers and plain SGD."""
    known = record.observed.get("optimizers")
    optimizers = [one for one in known if isinstance(one, Mapping)] if isinstance(known, list) else []
    reasons = []
    for optimizer in optimizers:
        name = str(optimizer.get("class", ""))
        given = optimizer.get("settings")
        settings: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        extra = [f"{word} {_plain(settings[key])}" for key, word in _REASONS.items() if settings.get(key)]
        if name != "SGD":
            reasons.append(name)
        elif extra:
            reasons.append(" and ".join(extra))
    return "; ".join(dict.fromkeys(reasons)) or "the steps were others, as after clipping or with a large ε"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
