"""The outcome of an evaluation: as a table, as JSON, and sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_normgeo.files import finite, write_document
from lightning_normgeo.robustness.decisions import Decisions
from lightning_normgeo.robustness.results import AttackResult
from lightning_normgeo.robustness.settings import RESCALED
from lightning_normgeo.robustness.shown import Shown

COLUMNS = (
    "attack",
    "accuracy",
    "ci_low",
    "ci_high",
    "accuracy_drop",
    "correct",
    "n",
    "eps",
    "std",
    "loss",
    "linf",
    "l2",
)
"""Of the table."""
NOTE = "note"
"""The last column of W&B's table: why an attack was not evaluated."""


@dataclass(frozen=True)
class RobustnessReport:
    """What an evaluation found.

    Attributes:
        results: by attack, ``clean`` first.
        settings: what decided them, as plain values.
        warnings: what looks as if an attack did not do its work.
        decisions: what became of each sample.
        shown: a few samples, for pictures, by :mod:`sample <lightning_normgeo.robustness.identity>`.
        weights: norms of the weights, raw and as the function sees them, and of the control.
        not_evaluated: why there is no result, by attack; under ``all attacks`` where there is none at all.
    """

    results: dict[str, AttackResult]
    settings: dict[str, Any]
    warnings: list[str]
    decisions: Decisions
    shown: Shown = field(default_factory=Shown)
    weights: dict[str, Any] = field(default_factory=dict)
    not_evaluated: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each attack, with the keys :data:`COLUMNS` and ``by_class``."""
        rows = []
        for name, result in self.results.items():
            strength = self.settings["attacks"].get(name.removesuffix(RESCALED), {})
            known = {"attack": name, "eps": self._radius(strength), "std": strength.get("std"), **asdict(result)}
            others = {"by_class": known["by_class"], "not_finite": known["not_finite"]}
            rows.append({**{column: known[column] for column in COLUMNS}, **others})
        return rows

    def _radius(self, strength: Mapping[str, Any]) -> float | None:
        """The radius that counts: a multiple of √d is multiplied out, where all images have as many values."""
        if not strength.get("times_sqrt_d"):
            radius: float | None = strength.get("eps")
            return radius
        values = self.settings.get("values_per_image")
        return None if values is None else float(strength["eps"] * values**0.5)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``robustness.json`` holds; None for numbers that JSON does not have."""
        known = {"settings": self.settings, "warnings": self.warnings, "results": self.rows()}
        found: dict[str, Any] = finite({**known, "not_evaluated": self.not_evaluated, "weights": self.weights})
        return found

    def save(self, folder: str | Path) -> None:
        """Write ``robustness.json``, and ``robustness.npz`` with what became of each sample.

        Each replaces an earlier one at once.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.results:
            self.decisions.save(folder / "robustness.npz")
        write_document(folder / "robustness.json", self.as_dict())

    def __str__(self) -> str:
        """Return the table."""
        width = max(len(name) for name in ("attack", *self.results, *self.not_evaluated))
        lines = [f"{'attack':{width}}  accuracy   95 % interval     drop       n"]
        for name, r in self.results.items():
            interval = f"{100 * r.ci_low:6.2f} … {100 * r.ci_high:6.2f}"
            lines.append(
                f"{name:{width}}  {100 * r.accuracy:6.2f} %  {interval}  {100 * r.accuracy_drop:6.2f}  {r.n:6}"
            )
        lines += [f"{name:{width}}  not evaluated: {reason}" for name, reason in self.not_evaluated.items()]
        if self.results and not self.settings.get("inputs", {}).get("confirmed", True):
            lines.append(f"inputs: {self.settings['inputs']['source'] or 'as declared'}, unconfirmed")
        return "\n".join([*lines, *self.warnings])
