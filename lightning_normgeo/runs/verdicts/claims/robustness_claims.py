"""Claims about robustness: attacks succeed, long weights are the cause, and weight decay helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_normgeo.robustness.results.statistics.statistics import holm, mcnemar, paired_interval
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.claims.claim import Claim
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import NOT_TESTED, REFUTED, SUPPORTED, UNDECIDED, Verdict
from lightning_normgeo.runs.verdicts.wording import counted, points
from lightning_normgeo.utilities.attack_names import attack_title, control_of, is_control, is_detail, split_attack

NOISE, ATTACK = "Noise", "Attack"
"""Kinds of conditions."""
KINDS: dict[str, Callable[[str], bool]] = {
    NOISE: lambda attack: attack.startswith("gaussian"),
    ATTACK: lambda attack: not attack.startswith(("gaussian", "clean")) and not is_control(attack),
}
"""Whether an attack, by its name, is of a kind."""
_DECIMALS = 12
"""Decimals of a difference of accuracies; what comes after them is rounding."""
Row = Mapping[str, Any]


def strongest(record: Record) -> dict[str, Row]:
    """Return the rows of results with the largest drop: under ``Noise``, and under an ``Attack``."""
    rows = [row for rows in _evaluations(record) for row in rows.values() if not is_control(row["attack"])]
    of_kind = {kind: [row for row in rows if belongs(row["attack"])] for kind, belongs in KINDS.items()}
    return {kind: max(some, key=lambda row: float(row["accuracy_drop"])) for kind, some in of_kind.items() if some}


def _evaluations(record: Record) -> Iterator[dict[str, Row]]:
    """Yield the rows by attack for each evaluation; those without samples, or from elsewhere, are left out."""
    for found in record.evaluations.values():
        rows = [row for row in found.get("results", []) if _is_complete(row) and not is_detail(row)]
        yield {row["attack"]: row for row in rows}


def _is_complete(row: Row) -> bool:
    numbers = ("accuracy", "accuracy_drop", "ci_low", "ci_high", "n")
    return isinstance(row.get("attack"), str) and all(isinstance(row.get(name), (int, float)) for name in numbers)


def _vulnerable(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge whether the strongest attack lowers the accuracy."""
    attacked = list(_attacked(record))
    if not attacked:
        return None
    row, clean = max(attacked, key=lambda pair: float(pair[0]["accuracy_drop"]))
    drop = difference(row["accuracy_drop"], 0.0)
    word, reason = _falls(row, clean, drop, thresholds)
    left, low, high = (100 * float(row[name]) for name in ("accuracy", "ci_low", "ci_high"))
    stay = f"{left:.1f} % of {row['n']} samples stay right ({low:.1f} … {high:.1f} %)"
    detail = f"Under {attack_title(row['attack'])}, {stay}."
    evidence = f"{row['attack']} and {clean['attack']}, n = {row['n']}"
    number, limit = points(drop, thresholds.accuracy_margin), f"more than {margin_of(thresholds)}"
    return Verdict(word, "lost", number, limit, reason, detail, evidence, drop)


def _attacked(record: Record) -> Iterator[tuple[Row, Row]]:
    """Yield the rows of attacks, each with the clean one of the same samples: of its evaluation and its loader."""
    for rows in _evaluations(record):
        for attack, row in rows.items():
            clean = rows.get(f"clean{split_attack(attack)[1]}")
            if clean is not None and KINDS[ATTACK](attack):
                yield row, clean


def _falls(row: Row, clean: Row, drop: float, thresholds: Thresholds) -> tuple[str, str]:
    """Return whether an accuracy is lower than the clean one, by the intervals of both."""
    margin = thresholds.accuracy_margin
    apart = row["ci_high"] < clean["ci_low"]
    if not _beats_guessing(clean):
        return UNDECIDED, "clean accuracy no better than guessing"
    if apart and drop > margin:
        return SUPPORTED, ""
    if clean["ci_high"] - row["ci_low"] <= margin:
        return REFUTED, ""
    return UNDECIDED, f"not more than {margin_of(thresholds)}" if apart else "intervals overlap"


def _beats_guessing(clean: Row) -> bool:
    """Whether the interval of the clean accuracy lies above the share of the most frequent class, if that is known."""
    counts = [of for _, of in (clean.get("by_class") or {}).values()]
    return len(counts) < 2 or bool(clean["ci_low"] > max(counts) / clean["n"])


def _norm_cause(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge longer weights as a cause, by the same network with rescaled weights on the same samples."""
    pairs = [
        (row, rows[control_of(attack)])
        for rows in _evaluations(record)
        for attack, row in rows.items()
        if not is_control(attack) and control_of(attack) in rows
    ]
    if not pairs:
        return None
    changes = [difference(control["accuracy"], row["accuracy"]) for row, control in pairs]
    word, reason = _caused(record, pairs, thresholds)
    factor = next((f for found in record.evaluations.values() if (f := found.get("settings", {}).get("rescale"))), None)
    times = f"{factor:g} × longer" if isinstance(factor, (int, float)) else "longer"
    changed = [control.get("changed") for _, control in pairs]
    of = sum(int(row["n"]) for row, _ in pairs)
    known = [one for one in changed if isinstance(one, int)]
    detail = f"Weights {times}, the function the same but for ε and rounding."
    if len(known) == len(changed):
        detail += f" {sum(known)} of {of} decisions differ."
    sizes = sorted({int(row["n"]) for row, _ in pairs})
    evidence = f"{counted(len(pairs), 'condition')}, n = {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))}"
    margin = thresholds.accuracy_margin
    largest = min(changes) if word == SUPPORTED else max(changes, key=abs)
    limit = f"more than {margin_of(thresholds)} lost" if word == SUPPORTED else f"within ±{margin_of(thresholds)}"
    return Verdict(word, "change", points(largest, margin, -margin, sign="+"), limit, reason, detail, evidence, largest)


def _caused(record: Record, pairs: list[tuple[Row, Row]], thresholds: Thresholds) -> tuple[str, str]:
    """Return whether accuracies stay the same under each condition, by paired intervals, or fall, by McNemar's test."""
    counts = [_discordant(row, control) for row, control in pairs]
    if None in counts:
        return UNDECIDED, "paired counts missing"
    known = [one for one in counts if one is not None]
    margin = thresholds.accuracy_margin
    intervals = [paired_interval(lost, won, n) for lost, won, n in known]
    if all(-margin <= low and high <= margin for low, high in intervals):
        return REFUTED, ""
    adjusted = holm([mcnemar(lost, won) for lost, won, _ in known])
    falls = [
        p < thresholds.alpha and (lost - won) / n > margin for p, (lost, won, n) in zip(adjusted, known, strict=True)
    ]
    if not any(falls):
        return UNDECIDED, "an accuracy rises" if any(low > margin for low, _ in intervals) else "too few samples"
    change = _logit_change(record)
    if change is None:
        return UNDECIDED, "logits not compared"
    return (UNDECIDED, "ε changed outputs") if change > thresholds.logit_change else (SUPPORTED, "")


def _discordant(row: Row, control: Row) -> tuple[int, int, int] | None:
    """Return the numbers of samples that only the network and only its control gets right, and n; None if unknown."""
    changed, n = control.get("changed"), int(row["n"])
    if not isinstance(changed, int) or control["n"] != row["n"]:
        return None
    won = round(n * (float(control["accuracy"]) - float(row["accuracy"])))  # more samples than are lost
    if abs(won) > changed or (changed - won) % 2:
        return None
    return (changed - won) // 2, (changed + won) // 2, n


def _logit_change(record: Record) -> float | None:
    """Return the largest change of a logit by the rescaling; None if an evaluation does not say it."""
    found = [one.get("weights", {}).get("rescaled") for one in record.evaluations.values()]
    known = [one.get("largest_logit_change") for one in found if isinstance(one, Mapping)]
    numbers = [float(one) for one in known if isinstance(one, (int, float)) and math.isfinite(one)]
    return max(numbers, default=None) if len(numbers) == len(known) else None


def _drop(kind: str) -> Callable[[Record, Thresholds], Verdict | None]:
    """Return the judge of weight decay in a single run, which gives the accuracy lost and decides nothing."""

    def judge(record: Record, _: Thresholds) -> Verdict | None:
        row = strongest(record).get(kind)
        if row is None:
            return None
        drop = float(row["accuracy_drop"])
        reason = "needs the same run without, and with, decay"
        detail = (
            f"The accuracy that {attack_title(row['attack'])} takes; what weight decay does to it takes a pair of runs."
        )
        return Verdict(NOT_TESTED, "lost", points(drop), "", reason, detail, f"{row['attack']}, n = {row['n']}", drop)

    return judge


def difference(first: float, second: float) -> float:
    """Return the difference of two accuracies without the rounding of shares, such as 0.03 for 0.8 − 0.77."""
    return round(float(first) - float(second), _DECIMALS)


def margin_of(thresholds: Thresholds) -> str:
    """Return the accuracy margin as text in percentage points."""
    return f"{100 * thresholds.accuracy_margin:g} pt"


_PAIRED = (
    "Number: mean difference of the accuracies, with minus without decay, over all pairs of runs that are otherwise "
    "equal, seed included, and over all {conditions}. For each sample all pairs and conditions together vote; p is "
    "that of the sign test of samples won against samples lost (McNemar's exact test for one pair), adjusted by Holm "
    "for the verdicts of the study. Supported if p is below `alpha` and the difference positive, refuted if "
    "negative, both only if more than half of the pairs differ in that direction, and none significantly in the "
    "other. It is about these networks: other seeds give others."
)
_PAIR = "runs with and without weight decay, otherwise equal, with RobustnessEvaluation, as `normgeo study paper_small`"
ROBUSTNESS_CLAIMS = (
    Claim(
        key="vulnerability",
        title="Attacks succeed",
        statement="Networks with scale-invariant normalizations are vulnerable to adversarial attacks.",
        source="section 2.5, Tables 1 and 2",
        rule=(
            "Number: accuracy lost under the attack that takes most. Supported if it is above `accuracy_margin` and "
            "the 95 % interval of the accuracy lies below that of the same samples without an attack; refuted if the "
            "intervals leave room for a loss of at most `accuracy_margin`. Undecided if the interval of the clean "
            "accuracy does not lie above that of guessing, the share of the most frequent class."
        ),
        needs="RobustnessEvaluation",
        stage="evaluation",
        section="robustness",
        thresholds=("accuracy_margin",),
        judge=_vulnerable,
    ),
    Claim(
        key="norm_cause",
        title="Long weights as cause",
        statement="A growing norm of the weights amplifies the attack, and so is a cause of vulnerability.",
        source="sections 2.5 and 3.2",
        rule=(
            "Number: largest change of an accuracy with longer weights, over all conditions; if supported, the largest "
            "loss. Refuted if each paired 95 % interval (Bonett, Price 2012) lies within ± `accuracy_margin`. "
            "Supported if under one of them more than `accuracy_margin` is lost, by McNemar's test at `alpha` after "
            "Holm's adjustment, and no logit changes by more than `logit_change`, so that ε is not the reason."
        ),
        needs="RobustnessEvaluation(rescale=10)",
        stage="evaluation",
        section="control",
        thresholds=("accuracy_margin", "logit_change", "alpha"),
        judge=_norm_cause,
    ),
    Claim(
        key="decay_noise",
        title="Decay helps: noise",
        statement="Weight decay raises the accuracy under Gaussian noise.",
        source="section 3.2, Tables 1 and 2",
        rule=_PAIRED.format(conditions="strengths of the noise"),
        needs=_PAIR,
        stage="study",
        section="paired",
        thresholds=("alpha",),
        judge=_drop(NOISE),
    ),
    Claim(
        key="decay_attack",
        title="Decay helps: attacks",
        statement="Weight decay raises the accuracy under adversarial attacks such as BIM.",
        source="section 3.2, Tables 1 and 2",
        rule=_PAIRED.format(conditions="attacks and radii"),
        needs=_PAIR,
        stage="study",
        section="paired",
        thresholds=("alpha",),
        judge=_drop(ATTACK),
    ),
)
"""Claims of sections 2.5 and 3.2 on robustness."""
