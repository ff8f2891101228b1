"""Verdicts of a study: of each claim the outcome in all of its runs, or of a test between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_normgeo.report.compared_runs import Run, compare_runs
from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation, evaluations_of
from lightning_normgeo.report.verdicts.effective_weights import effective_verdict
from lightning_normgeo.report.verdicts.paired_claims import paired_verdicts
from lightning_normgeo.runs.records.record import Record, evaluation_stem
from lightning_normgeo.runs.verdicts.run_verdicts import verdicts
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import (
    DECIDED,
    NOT_APPLICABLE,
    NOT_TESTED,
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    WORDS,
    Verdict,
)
from lightning_normgeo.runs.verdicts.wording import counted
from lightning_normgeo.utilities.attack_names import is_control, without_control

_NAMED = 3


def study_verdicts(records: Sequence[Record], thresholds: Thresholds | None = None) -> dict[str, Verdict]:
    """Return the verdict of several runs together on each claim of the paper.

    A claim about single runs is supported if more than half of the runs that test it support it, and none refutes it;
    it is refuted likewise. Claims about weight decay are tested on pairs of runs that are otherwise equal. For a single
    run these are the verdicts of :func:`~lightning_normgeo.runs.verdicts.run_verdicts.verdicts`.

    Args:
        records: Records of the runs.
        thresholds: Limits of the verdicts. Default: those that the documentation gives.

    Returns:
        Verdicts by the key of the claim, in the order of the table of claims.

    Example:
        >>> study_verdicts([read_record(run) for run in runs])["norm_cause"].word
        'refuted'
    """
    return verdicts_of(compare_runs(records), thresholds)


def verdicts_of(runs: Sequence[Run], thresholds: Thresholds | None = None) -> dict[str, Verdict]:
    """Return the verdicts of the runs of a report; see :func:`study_verdicts`."""
    limits = thresholds or Thresholds()
    evaluations = evaluations_of(runs)
    by_folder = {evaluation.run.name: evaluation for evaluation in evaluations}
    found = [verdicts(_with_paired_counts(run.record, by_folder.get(run.name)), limits) for run in runs]
    joint = {key: _joint([one[key] for one in found]) for key in found[0]} if found else {}
    effective = effective_verdict(evaluations, limits)
    more = {} if effective is None else {"effective_weights": effective}
    return joint | paired_verdicts(evaluations, limits) | more


def _with_paired_counts(record: Record, evaluation: Evaluation | None) -> Record:
    """Return a record in which controls have paired counts, which records of earlier versions lack."""
    if evaluation is None:
        return record

    def counted(row: dict[str, Any]) -> dict[str, Any]:
        name = row.get("attack", "")
        missing = is_control(name) and row.get("changed") is None and without_control(name) in evaluation.rows
        return {**row, "changed": evaluation.changed(without_control(name))} if missing else row

    evaluated = {evaluation_stem(name): found for name, found in record.evaluations.items() if "results" in found}
    counts = {
        stem: {**found, "results": [counted(row) for row in found["results"]]} for stem, found in evaluated.items()
    }
    return replace(record, results=record.results | counts)


def _joint(some: Sequence[Verdict]) -> Verdict:
    """Return the verdict of all runs on one claim."""
    if len(some) == 1:
        return some[0]
    words = Counter(one.word for one in some)
    tested = len(some) - words[NOT_TESTED] - words[NOT_APPLICABLE]
    if not tested:
        word = NOT_APPLICABLE if words[NOT_APPLICABLE] else NOT_TESTED
        return _summed_up([one for one in some if one.word == word], word, some)
    agreed = [one for one in DECIDED if words[one] > tested / 2]
    word = agreed[0] if agreed and not (words[SUPPORTED] and words[REFUTED]) else UNDECIDED
    shown = [one for one in some if one.word not in (NOT_TESTED, NOT_APPLICABLE)]
    return _summed_up(shown, word, some)


def _summed_up(shown: Sequence[Verdict], word: str, some: Sequence[Verdict]) -> Verdict:
    """Return one verdict with the smallest and the largest number of the runs that it is about."""
    known = sorted((one for one in shown if math.isfinite(one.value)), key=lambda one: one.value)
    ends = list(dict.fromkeys(one.number for one in known[:1] + known[-1:]))
    same = [one for one in shown if one.word == word] or list(shown)
    first, untested = same[0], len(some) - len(shown)
    is_tested = first.word not in (NOT_TESTED, NOT_APPLICABLE)
    verb = "does" if untested == 1 else "do"
    parts = [
        _counts(shown) if is_tested else first.detail,
        f"{counted(untested, 'more run')} {verb} not test it." if untested and is_tested else "",
    ]
    return replace(
        first,
        word=word,
        number=" … ".join(ends),
        limit=" / ".join(dict.fromkeys(one.limit for one in same if one.limit)),
        evidence=_evidence(shown),
        reason="" if word in DECIDED else _reasons(same, shown),
        detail=" ".join(filter(None, parts)),
        value=known[-1].value if known else math.nan,
        runs=_how_many(shown, word) if is_tested else "",
    )


def _how_many(shown: Sequence[Verdict], word: str) -> str:
    """Return the number of runs with a word among all, such as "7 of 8 runs"; that of all runs if none has it."""
    count = sum(one.word == word for one in shown)
    return f"{count} of {len(shown)} runs" if count else f"{len(shown)} runs"


def _counts(shown: Sequence[Verdict]) -> str:
    """Return the number of runs with each word; empty if all have the same."""
    words = Counter(one.word for one in shown)
    counts = ", ".join(f"{words[word]} {word}" for word in WORDS if words[word])
    return f"Runs: {counts}." if len(words) > 1 else ""


def _evidence(shown: Sequence[Verdict]) -> str:
    """Return the evidence of runs together: of the first few in which it differs."""
    different = list(dict.fromkeys(one.evidence for one in shown if one.evidence))
    more = f" / {counted(len(different) - _NAMED, 'other')}" if len(different) > _NAMED else ""
    return " / ".join(different[:_NAMED]) + more


def _reasons(same: Sequence[Verdict], shown: Sequence[Verdict]) -> str:
    """Return the reasons for which runs together decide nothing."""
    if {SUPPORTED, REFUTED} <= {one.word for one in shown}:
        return "runs contradict each other"
    reasons = list(dict.fromkeys(one.reason for one in same if one.reason))
    more = "; …" if len(reasons) > _NAMED else ""
    return "; ".join(reasons[:_NAMED]) + more or "too few runs decide"
