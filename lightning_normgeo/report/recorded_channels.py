"""Results of channel evaluations in the records of a report's runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.runs.quantities.channels import CHANNELS

CRITERIA = {
    "gamma": "|γ|",
    "product": "|γ|·‖W_next‖",
    "share": "share of its readers' input",
    "similar": "similar (γ, β)",
    "pairs": "similar outputs",
    "random": "random",
}
"""Titles of criteria."""
REPLACED = {"zero": "replaced by 0", "mean": "replaced by β", "partner": "replaced by the most similar channel"}
"""Titles of replacements."""
_SHUFFLED = "_shuffled"
_NUMBERS = ("ratio", "removed_share", "accuracy", "ci_low", "ci_high", "n")


def criterion_title(name: str) -> str:
    """Return the title of a criterion, or of the control that shuffles its channels within layers."""
    base = name.removesuffix(_SHUFFLED)
    title = CRITERIA.get(base, base)
    return f"{title}, shuffled in each layer" if name.endswith(_SHUFFLED) else title


def is_control(name: str) -> bool:
    """Whether a criterion draws channels at random."""
    return name == "random" or name.endswith(_SHUFFLED)


def evaluation_of(run: Run) -> Mapping[str, Any]:
    """Return the document of a channel evaluation as a run recorded it; empty without an evaluation."""
    found = run.record.results.get(CHANNELS)
    return found if isinstance(found, Mapping) else {}


def clean_of(run: Run) -> Mapping[str, Any] | None:
    """Return the accuracy of the whole network; None without one."""
    found = evaluation_of(run).get("clean")
    return found if isinstance(found, Mapping) and _is_complete({"ratio": 0, "removed_share": 0, **found}) else None


def results_of(run: Run) -> list[Mapping[str, Any]]:
    """Return the accuracies with masked channels."""
    rows = evaluation_of(run).get("results")
    return [row for row in rows if isinstance(row, Mapping) and _is_complete(row)] if isinstance(rows, Sequence) else []


def reasons_of(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the name of what was not evaluated, and the reason."""
    found = evaluation_of(run)
    if found.get("not_evaluated"):
        yield "channels", str(found["not_evaluated"])
    left_out = found.get("left_out")
    for criterion, why in left_out.items() if isinstance(left_out, Mapping) else ():
        yield f"channels by {criterion_title(criterion)}", str(why)


def _is_complete(row: Mapping[str, Any]) -> bool:
    """Whether a row has its names and finite numbers, as a record that another tool has written may not."""
    return all(isinstance(row.get(name), (int, float)) for name in _NUMBERS)
