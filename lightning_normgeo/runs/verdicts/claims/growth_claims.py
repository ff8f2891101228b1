"""Claims about the norms of weights: eq 16, increments of any optimizer, growth, and equilibrium under weight decay."""

from __future__ import annotations

import math
from statistics import median

from lightning_normgeo.runs.quantities.spheres import ON_SPHERES
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.claims.claim import Claim
from lightning_normgeo.runs.verdicts.curves import curve, relative_error, span
from lightning_normgeo.runs.verdicts.optimizers import (
    eq16_applies,
    is_known,
    other_than_sgd,
    weight_decay_of,
    why_not_eq16,
)
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import NOT_APPLICABLE, REFUTED, SUPPORTED, UNDECIDED, Verdict
from lightning_normgeo.runs.verdicts.wording import (
    beside,
    counted,
    exactly,
    nearly_all,
    scientific,
    significant,
    too_few,
)

_G = "norm_growth"
_INCREMENT, _RESIDUAL, _FLOOR = f"{_G}/increment", f"{_G}/residual", f"{_G}/storage_floor"
_PREDICTED, _MOMENTUM, _APPLIES = f"{_G}/predicted", f"{_G}/predicted_momentum", f"{_G}/eq16_applies"
_NORM = f"{_G}/weight_norm"
_ANGLE, _EQUILIBRIUM, _TIME = f"{_G}/angular_update", f"{_G}/equilibrium_angle", f"{_G}/steps_to_equilibrium"
_VISIBLE = 1e-3
"""Relative growth that four decimals show."""
_UNCHANGED = "the norm does not change"
_UNKNOWN = "optimizer not recorded"
_SAME_ANGLE = 0.01
"""Relative change of the equilibrium angle within which learning rate and weight decay count as constant."""


def _equation_16(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge eq 16 by the steps that it covers; for other optimizers give the error of the law that holds instead."""
    measured, predicted = curve(record, _INCREMENT), curve(record, _PREDICTED)
    if not predicted:
        return None
    if not eq16_applies(record):
        return _not_plain_sgd(record, measured)
    applies = curve(record, _APPLIES)
    covered = [step for step in predicted if step in measured and applies.get(step, 1.0)]
    error = relative_error({step: predicted[step] for step in covered}, measured)
    if error is None:
        return Verdict(UNDECIDED, reason=_UNCHANGED, evidence=span(record, _PREDICTED, _INCREMENT))
    word, reason = _law(record, error, {step: measured[step] for step in covered}, thresholds)
    if word != SUPPORTED and not is_known(record):
        word, reason = UNDECIDED, _UNKNOWN
    total = sum(measured[step] for step in covered)
    ratio = sum(predicted[step] for step in covered) / total if total else math.nan
    parts = [
        f"All predicted increments together are {ratio:.5f} × the measured ones." if math.isfinite(ratio) else "",
        f"Eq 16 covers {len(covered)} of {len(predicted)} steps." if len(covered) < len(predicted) else "",
    ]
    limit = thresholds.increment_error
    return Verdict(
        word,
        "error",
        scientific(error, limit, thresholds.far * limit),
        f"limit {exactly(limit)}",
        reason,
        " ".join(filter(None, parts)),
        span(record, _PREDICTED, _INCREMENT),
        error,
        steps=len(covered),
    )


def _not_plain_sgd(record: Record, measured: dict[int, float]) -> Verdict:
    law = curve(record, _MOMENTUM)
    error = relative_error(law, measured)
    detail = "Eq 16 is about SGD without momentum and weight decay."
    if error is not None:
        detail = f"The law with these terms and ⟨W, ∇W⟩ = 0 misses the measured increments by {error:.1e} of their sum."
    evidence = span(record, _MOMENTUM if law else _PREDICTED, _INCREMENT)
    return Verdict(NOT_APPLICABLE, reason=why_not_eq16(record), detail=detail, evidence=evidence)


def _explained(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge the optimizer's formula by its residuals."""
    measured, residual, floor = (curve(record, key) for key in (_INCREMENT, _RESIDUAL, _FLOOR))
    if not residual:
        return None
    measured = {step: value for step, value in measured.items() if step in residual}
    total = sum(map(abs, measured.values()))
    if not total:
        return Verdict(UNDECIDED, reason=_UNCHANGED, evidence=span(record, _RESIDUAL, _INCREMENT))
    missed = sum(abs(residual[step]) for step in measured) / total
    word, reason = _law(record, missed, measured, thresholds)
    ratios = [abs(residual[step]) / floor[step] for step in residual if floor.get(step)]
    detail = f"The rest is at most {max(ratios):.2g} × what rounding can add." if ratios else ""
    share = max(0.0, 1 - missed)
    limit = f"least {100 * (1 - thresholds.increment_error):g} %"
    evidence = span(record, _RESIDUAL, _INCREMENT)
    number = nearly_all(share, 1 - thresholds.increment_error)
    return Verdict(word, "share", number, limit, reason, detail, evidence, share, steps=len(measured))


def _law(record: Record, error: float, measured: dict[int, float], thresholds: Thresholds) -> tuple[str, str]:
    """Return whether a law of some increments holds, by its relative error and what rounding of weights can hide."""
    total, floor = sum(map(abs, measured.values())), curve(record, _FLOOR)
    hidden = sum(floor.get(step, 0.0) for step in measured) / total if total else math.inf
    if error <= thresholds.increment_error:
        return SUPPORTED, ""
    if hidden > thresholds.increment_error:
        return UNDECIDED, "steps near rounding"
    far = thresholds.far * thresholds.increment_error
    return (REFUTED, "") if error > far else (UNDECIDED, "near the limit")


def _growth(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge monotone growth under SGD without weight decay: no step may shrink the norm by more than rounding."""
    norms, increments, floor = curve(record, _NORM), curve(record, _INCREMENT), curve(record, _FLOOR)
    if not norms:
        return None
    if len(norms) == 1:
        return Verdict(UNDECIDED, reason=too_few(1, thresholds.min_steps), evidence=span(record, _NORM))
    first, *_, last = norms.values()
    ratio = last / first if first else math.nan
    detail = f"‖W‖ {first:.4g} → {last:.4g}; no output changes by that alone."
    evidence = span(record, _NORM, _INCREMENT)
    decimals = 4 if abs(ratio - 1) > _VISIBLE else 7
    number = f"× {beside(ratio, (1.0,), lambda count: f'{ratio:.{count}f}', decimals)}"
    decay = _decay(record)
    reason = _why_no_growth(record, decay)
    if reason:
        return Verdict(NOT_APPLICABLE, "‖W‖", number, "", reason, detail, evidence, ratio)
    shrinking = [-value for step, value in increments.items() if value < -floor.get(step, 0.0)]
    growing = sum(value for value in increments.values() if value > 0)
    detail += f" Shrinking: {len(shrinking)} of {counted(len(increments), 'measured step')}."
    word, reason = UNDECIDED, counted(len(shrinking), "shrinking step")
    if decay is None:
        reason = _UNKNOWN
    elif not shrinking:
        reason = _UNCHANGED if last == first else "no larger at the end"
    if decay is not None and sum(shrinking) > thresholds.increment_error * growing and last <= first:
        word, reason = REFUTED, ""
    elif decay is not None and not shrinking and last > first:
        word, reason = SUPPORTED, ""
    return Verdict(word, "‖W‖", number, "only growing", reason, detail, evidence, ratio, steps=len(norms))


def _why_no_growth(record: Record, decay: float | None) -> str:
    """Return the reason for which norms need not grow in a run; empty if they have to, or it is not known."""
    if curve(record, ON_SPHERES):
        return "held on spheres"
    if other := other_than_sgd(record):
        return other
    if decay:
        return f"weight decay {decay:g}"
    return "weight decay" if curve(record, _EQUILIBRIUM) else ""


def _decay(record: Record) -> float | None:
    """Return the weight decay, also of a run that was killed before it noted its optimizers; None if unknown."""
    applies = record.points(_APPLIES)
    return 0.0 if applies and all(value for _, value in applies) else weight_decay_of(record)


def _equilibrium(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge the angle per step against its equilibrium, once the way there is over."""
    angles, wanted, times = (curve(record, key) for key in (_ANGLE, _EQUILIBRIUM, _TIME))
    steps = _constant_tail({step: value for step, value in wanted.items() if step in angles and value})
    if not steps:
        return _without_decay(record) if angles else None
    if curve(record, ON_SPHERES):
        return Verdict(NOT_APPLICABLE, reason="held on spheres", evidence=span(record, _ANGLE, ON_SPHERES))
    late = steps[-max(1, len(steps) // 4) :]
    ratio = median(angles[step] / wanted[step] for step in late)
    time = times.get(steps[-1])
    passed = (steps[-1] - steps[0]) / time if time else 0.0
    apart = max(ratio, 1 / ratio) if ratio > 0 else math.inf
    if passed < thresholds.equilibrium_times:
        times_passed = significant(passed, thresholds.equilibrium_times)
        word, reason = UNDECIDED, f"{times_passed} of {thresholds.equilibrium_times:g} time constants"
    elif apart <= thresholds.equilibrium_factor:
        word, reason = SUPPORTED, ""
    else:
        refuted = apart > thresholds.equilibrium_factor**2
        word, reason = (REFUTED, "") if refuted else (UNDECIDED, "near the limit")
    factor = thresholds.equilibrium_factor
    number, limit = significant(ratio, factor, 1 / factor, factor**2, 1 / factor**2), f"1 within × {factor:g}"
    detail = f"Time constant of the way there: {time:.4g} steps; passed: {significant(passed)} of them." if time else ""
    evidence = span(record, _ANGLE, _EQUILIBRIUM)
    return Verdict(word, "angle", f"{number} ×", limit, reason, detail, evidence, ratio, steps=len(steps))


def _without_decay(record: Record) -> Verdict | None:
    """Return that there is no equilibrium without weight decay; None if the record does not name the optimizer."""
    decay = _decay(record)
    if decay is None:
        return None
    reason = f"no formula for {other_than_sgd(record) or 'this optimizer'}" if decay else "no weight decay"
    return Verdict(NOT_APPLICABLE, reason=reason, evidence=span(record, _ANGLE))


def _constant_tail(angles: dict[int, float]) -> list[int]:
    """Return the last steps over which the equilibrium angle, and so learning rate and weight decay, stay the same."""
    steps: list[int] = []
    last = next(reversed(angles.values()), 0.0)
    for step in reversed(angles):
        if abs(angles[step] - last) > _SAME_ANGLE * last:
            break
        steps.append(step)
    return steps[::-1]


GROWTH_CLAIMS = (
    Claim(
        key="equation_16",
        title="Eq 16: Δ‖W‖² = η²‖∇W‖²",
        statement="Under plain SGD each step adds exactly η²‖∇W‖² to ‖W‖² of a scale-invariant weight.",
        source="eq 16",
        rule=(
            "Number: Σ|η²‖∇W‖² − Δ‖W‖²| over Σ|Δ‖W‖²|, all measured steps that eq 16 covers. Supported up to "
            "`increment_error`; refuted above `far` times that, unless rounding of the stored weights can add as "
            "much. Not applicable with momentum, weight decay or another optimizer; then the error of the law that "
            "includes them is given."
        ),
        needs="NormGrowthMonitor",
        section="increments",
        thresholds=("increment_error", "far", "min_steps"),
        keys=(_PREDICTED, _INCREMENT, _APPLIES, _MOMENTUM, _FLOOR),
        invariant=_NORM,
        judge=_equation_16,
    ),
    Claim(
        key="increments",
        title="Increments explained",
        statement="The formula of the optimizer, with all its terms, gives the increment of ‖W‖².",
        source="extends eq 16 to any optimizer",
        rule=(
            "Number: 1 − Σ|residual| over Σ|Δ‖W‖²|, all measured steps. Supported from 1 − `increment_error` on; "
            "refuted below 1 − `far` × `increment_error`, unless rounding of the stored weights can add as much."
        ),
        needs="NormGrowthMonitor, and an optimizer with a formula",
        section="increments",
        thresholds=("increment_error", "far", "min_steps"),
        keys=(_RESIDUAL, _INCREMENT, _FLOOR),
        invariant=_NORM,
        judge=_explained,
        headline="increments_explained",
    ),
    Claim(
        key="growth",
        title="Norms grow (Lemma 3)",
        statement="Under SGD without weight decay the norm of scale-invariant weights only grows.",
        source="section 2.5, Fig 3",
        rule=(
            "Number: ‖W‖ at the last over the first measured step. Supported if it is above 1 and no measured step "
            "shrinks ‖W‖² by more than rounding; refuted if ‖W‖ ends no larger than it began, with shrinking steps "
            "beyond `increment_error` of the growth. Not applicable with weight decay, other optimizers than SGD, or "
            "SphereProjection."
        ),
        needs="NormGrowthMonitor",
        section="norms",
        thresholds=("increment_error", "min_steps"),
        keys=(_NORM, _INCREMENT, _FLOOR, ON_SPHERES),
        invariant=_NORM,
        judge=_growth,
    ),
    Claim(
        key="equilibrium",
        title="Decay: equilibrium",
        statement=(
            "With weight decay the norm settles, where decay and gradient noise balance; steps then turn W by "
            "a known angle."
        ),
        source="section 3.2, Fig 3; angle: Wan et al. 2021, Kosson et al. 2024",
        rule=(
            "Number: median of measured over equilibrium angle in the last quarter of the steps with a constant "
            "equilibrium angle. Supported if it is 1 within `equilibrium_factor`, refuted if beyond its square, both "
            "only after `equilibrium_times` time constants."
        ),
        needs="NormGrowthMonitor, and weight decay",
        section="angles",
        thresholds=("equilibrium_factor", "equilibrium_times", "min_steps"),
        keys=(_ANGLE, _EQUILIBRIUM, _TIME, ON_SPHERES),
        invariant=_NORM,
        judge=_equilibrium,
    ),
)
"""Claims of eq 16, section 2.5 and Fig 3."""
