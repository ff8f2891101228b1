"""The outcome of an evaluation: as a table, as JSON, and sample by sample."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_normgeo.files import write_document
from lightning_normgeo.robustness.decisions import Decisions
from lightning_normgeo.robustness.evaluation import RobustnessEvaluator
from lightning_normgeo.robustness.results import AttackResult, results_of, suspicions
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


@dataclass(frozen=True)
class RobustnessReport:
    """What an evaluation found.

    Attributes:
        results: by attack, ``clean`` first.
        settings: what decided them, as plain values.
        warnings: what looks as if an attack did not do its work.
        decisions: what became of each sample.
        shown: a few samples, for pictures.
        weights: norms of the weights, raw and as the function sees them, and of the control.
    """

    results: dict[str, AttackResult]
    settings: dict[str, Any]
    warnings: list[str]
    decisions: Decisions
    shown: Shown = field(default_factory=Shown)
    weights: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each attack, with the keys :data:`COLUMNS` and ``by_class``."""
        rows = []
        for name, result in self.results.items():
            strength = self.settings["attacks"].get(name.removesuffix(RESCALED), {})
            known = {"attack": name, "eps": strength.get("eps"), "std": strength.get("std"), **asdict(result)}
            rows.append({**{column: known[column] for column in COLUMNS}, "by_class": known["by_class"]})
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Return what ``robustness.json`` holds."""
        return {"settings": self.settings, "warnings": self.warnings, "results": self.rows(), "weights": self.weights}

    def save(self, folder: str | Path) -> None:
        """Write ``robustness.json``, and ``robustness.npz`` with what became of each sample."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.decisions.save(folder / "robustness.npz")
        write_document(folder / "robustness.json", self.as_dict())

    def __str__(self) -> str:
        """Return the table."""
        width = max(len(name) for name in self.results)
        lines = [f"{'attack':{width}}  accuracy   95 % interval     drop       n"]
        for name, r in self.results.items():
            interval = f"{100 * r.ci_low:6.2f} … {100 * r.ci_high:6.2f}"
            lines.append(
                f"{name:{width}}  {100 * r.accuracy:6.2f} %  {interval}  {100 * r.accuracy_drop:6.2f}  {r.n:6}"
            )
        return "\n".join([*lines, *self.warnings])


def report_of(decisions: Decisions, evaluator: RobustnessEvaluator) -> RobustnessReport:
    """Return the report of the decisions of an evaluator, or of several in as many processes."""
    settings = evaluator.settings
    return RobustnessReport(
        results=results_of(decisions),
        settings=settings.describe(evaluator.inputs),
        warnings=suspicions(decisions, settings.all_attacks),
        decisions=decisions,
        shown=evaluator.shown,
        weights=evaluator.weights(),
    )
