"""Findings of a run: for each claim of the paper the number that decides it, from the run's record.

The report shows them as cards, and the summary in the terminal as its first lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning_normgeo.runs.findings.equation_16 import eq16_applies, why_not_eq16
from lightning_normgeo.runs.findings.finding import Finding as Finding
from lightning_normgeo.runs.findings.symmetry_findings import SYMMETRY_KEYS, symmetry_findings
from lightning_normgeo.runs.record import Record
from lightning_normgeo.utilities.attack_names import attack_title, control_of, is_control

FINDING_KEYS = (
    "orthogonality/max_abs_cos",
    "orthogonality/max_abs_cos_corrected",
    "orthogonality_control/max_abs_cos",
    "norm_growth/increment",
    "norm_growth/residual",
    "norm_growth/storage_floor",
    "norm_growth/predicted",
    "norm_growth/predicted_momentum",
    "norm_growth/eq16_applies",
    "norm_growth/weight_norm",
    "affine/gamma2_over_sigma2_median",
    *SYMMETRY_KEYS,
)
"""Metric keys that findings are made from."""


def findings_of(record: Record) -> list[Finding]:
    """Return the findings of a run, in the order of the report; those that were not measured are left out."""
    found = [make(record) for make in (_orthogonality, _explained, _equation_16, _norms, _affine)]
    geometry = [finding for finding in found if finding is not None]
    return [*geometry, *symmetry_findings(record), *_robustness(record), *_rescaled(record)]


def joint_findings(records: Sequence[Record]) -> list[Finding]:
    """Return the findings of several runs together: of each claim the smallest and the largest number."""
    by_topic: dict[str, list[Finding]] = {}
    for record in records:
        for finding in findings_of(record):
            by_topic.setdefault(finding.topic, []).append(finding)
    return [some[0] if len(records) == 1 else _joint(some) for some in by_topic.values()]


def _joint(some: Sequence[Finding]) -> Finding:
    known = sorted((one for one in some if math.isfinite(one.value)), key=lambda one: one.value)
    words = dict.fromkeys(one.number for one in some if not math.isfinite(one.value))
    ends = list(dict.fromkeys(one.number for one in known[:1] + known[-1:]))
    number = " … ".join(ends) or ", ".join(words)
    without = len(some) - len(known)
    apart = f" In {without} more: {', '.join(words)}." if known and without else ""
    shown = known or list(some)
    first = shown[0]
    alike = len({one.quantity for one in shown}) == 1
    runs = f"{len(shown)} runs" if len(shown) > 1 else "one run"
    quantity = f"{first.quantity if alike else first.of_several}, {runs}"
    return Finding(first.topic, number, quantity, apart.strip(), first.section)


def _points(record: Record, key: str) -> dict[int, float]:
    return dict(record.points(key))


def _largest(record: Record, key: str) -> float | None:
    points = _points(record, key)
    return max(map(abs, points.values())) if points else None


def _orthogonality(record: Record) -> Finding | None:
    largest, control = (
        _largest(record, f"{group}/max_abs_cos") for group in ("orthogonality", "orthogonality_control")
    )
    corrected = _largest(record, "orthogonality/max_abs_cos_corrected")
    if largest is None:
        if control is None:
            return None
        detail = "The paper's laws are about others; curves of these weights are what the laws do not force."
        if record.points("symmetry/max_charge"):
            detail = "No weight is so alone; several together are, see the symmetries."
        return Finding("W ⟂ ∇W", "not covered", "no weight was found scale invariant", detail, "orthogonality")
    parts = []
    if corrected is not None and corrected < 0.5 * largest:
        parts.append(f"{corrected:.1e} without the part of ε")
    if control is not None:
        parts.append(f"{control:.1e} in other weights")
    detail = f"{'; '.join(parts)}." if parts else ""
    quantity = "largest |cos(W, ∇W)| of scale-invariant weights"
    return Finding("W ⟂ ∇W", f"{largest:.1e}", quantity, detail, "orthogonality", largest, headline="max_abs_cos")


def _explained(record: Record) -> Finding | None:
    increment, residual = (_points(record, f"norm_growth/{name}") for name in ("increment", "residual"))
    floor = _points(record, "norm_growth/storage_floor")
    total = sum(abs(increment[step]) for step in residual if step in increment)
    if not residual or not total:
        return None
    share = max(0.0, 1 - sum(map(abs, residual.values())) / total)
    ratios = [abs(residual[step]) / floor[step] for step in residual if floor.get(step)]
    detail = ""
    if ratios:
        detail = f"The rest is at most {max(ratios):.2g} × what rounding can add."
    quantity = "of Δ‖W‖² per step follows from the optimizer's formula"
    name = "increments_explained"
    return Finding("Increments explained", _percent(share), quantity, detail, "increments", share, headline=name)


def _percent(share: float) -> str:
    """Return a share with as many digits as tell it from 100 %, at most six."""
    digits = 1 if share < 0.99 or share >= 1 else min(6, math.ceil(-math.log10(1 - share)) - 1)
    return f"{100 * share:.{digits}f} %"


def _equation_16(record: Record) -> Finding | None:
    measured, predicted = (_points(record, f"norm_growth/{name}") for name in ("increment", "predicted"))
    if not predicted:
        return None
    if eq16_applies(record):
        ratio = _ratio(predicted, measured)
        quantity = "η²‖∇W‖² over the measured Δ‖W‖², all measured steps"
        return None if ratio is None else Finding("Eq 16", f"{ratio:.5f}", quantity, "", "increments", ratio)
    ratio = _ratio(_points(record, "norm_growth/predicted_momentum"), measured)
    detail = f"Here: {why_not_eq16(record)}"
    detail += "." if ratio is None else f". With them the law gives {ratio:.5f} × the measured."
    return Finding("Eq 16", "not covered", "Δ‖W‖² = η²‖∇W‖² is about plain SGD", detail, "increments")


def _ratio(above: Mapping[int, float], below: Mapping[int, float]) -> float | None:
    steps = above.keys() & below.keys()
    total = sum(below[step] for step in steps)
    return sum(above[step] for step in steps) / total if total else None


def _norms(record: Record) -> Finding | None:
    points = list(_points(record, "norm_growth/weight_norm").values())
    if len(points) < 2 or not points[0]:
        return None
    detail = f"{points[0]:.4g} → {points[-1]:.4g}; no output changes by that alone."
    ratio = points[-1] / points[0]
    quantity = "‖W‖ at the last over the first measured step"
    return Finding("Norm growth", f"× {ratio:.4f}", quantity, detail, "norms", ratio)


def _affine(record: Record) -> Finding | None:
    points = list(_points(record, "affine/gamma2_over_sigma2_median").values())
    if not points:
        return None
    detail = f"{points[0]:.3g} at the start; 1 would be γ = σ."
    return Finding(
        "γ against σ", f"{points[-1]:.3g}", "median γ²/σ² of all channels at the end", detail, "affine", points[-1]
    )


def _robustness(record: Record) -> Iterator[Finding]:
    """Yield the drop under noise, and the largest under an attack that follows the gradient."""
    for topic, row in strongest(record).items():
        yield _drop(topic, row)


def strongest(record: Record) -> dict[str, dict[str, Any]]:
    """Return the rows of results with the largest drop: under ``Noise``, and under an ``Attack``."""
    rows = [row for found in record.evaluations.values() for row in found.get("results", []) if _is_complete(row)]
    rows = [row for row in rows if not is_control(row["attack"])]
    kinds: dict[str, Callable[[str], bool]] = {
        "Noise": lambda attack: attack.startswith("gaussian"),
        "Attack": lambda attack: not attack.startswith(("gaussian", "clean")),
    }
    of_kind = {topic: [row for row in rows if belongs(row["attack"])] for topic, belongs in kinds.items()}
    return {topic: max(some, key=lambda row: float(row["accuracy_drop"])) for topic, some in of_kind.items() if some}


def _drop(topic: str, row: Mapping[str, Any]) -> Finding:
    drop = 100 * float(row["accuracy_drop"])
    left, low, high = (100 * float(row[name]) for name in ("accuracy", "ci_low", "ci_high"))
    detail = f"{left:.1f} % of {row['n']} samples stay right ({low:.1f} … {high:.1f} %)."
    quantity = f"points of accuracy lost under {attack_title(row['attack'])}"
    of_several = f"points of accuracy lost under the {topic.lower()} that takes most of a run"
    return Finding(topic, f"{drop:.1f}", quantity, detail, "robustness", drop, of_several)


def _rescaled(record: Record) -> Iterator[Finding]:
    """Yield the largest change of an accuracy in the control with rescaled weights."""
    changes, factor = [], None
    for found in record.evaluations.values():
        rows = {row["attack"]: row for row in found.get("results", []) if _is_complete(row)}
        for attack, row in rows.items():
            control = rows.get(control_of(attack))
            if control is not None:
                changes.append(100 * abs(float(control["accuracy"]) - float(row["accuracy"])))
                factor = found.get("settings", {}).get("rescale")
    if changes:
        times = f"{factor:g} × " if isinstance(factor, (int, float)) else ""
        quantity = f"points, the largest change of an accuracy with {times}longer weights"
        detail = "The function is the same, so robustness cannot depend on ‖W‖ alone."
        of_several = "points, the largest change of an accuracy with longer weights"
        yield Finding("Rescaled weights", f"{max(changes):.2f}", quantity, detail, "control", max(changes), of_several)


def _is_complete(row: Mapping[str, Any]) -> bool:
    names = ("accuracy", "ci_low", "ci_high", "accuracy_drop")
    return isinstance(row.get("attack"), str) and all(isinstance(row.get(name), (int, float)) for name in names)
