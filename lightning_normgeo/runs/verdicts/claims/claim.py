"""Claim, one statement of the paper, and the function that judges it from the record of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import Verdict

Judge = Callable[[Record, Thresholds], Verdict | None]
"""A function that judges a claim; None if the record has nothing about it."""


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        key: Name of the claim in code, tables and files.
        title: Name in a few words, with the paper's name for it.
        statement: The claim as a plain sentence.
        source: Place in the paper, or the origin of a claim that extends it.
        rule: When it is supported, refuted and undecided.
        needs: What a run needs so that the claim is tested.
        stage: What tests it: a ``training``, the ``evaluation`` of one run, or the evaluations of a ``study``.
        section: Beginning of the anchor of the figure or table that shows it, in a report.
        thresholds: Names of the :class:`Thresholds` that the rule uses.
        keys: Metric keys that the verdict is made from.
        invariant: Metric key that has a value wherever weights are scale invariant by themselves, if the claim is about
            those; a record that only has it for controls has none.
        judge: Function that judges it from the record of a run; None if no single run can test it.
        headline: Name of the number in the summary that W&B's table of runs shows; empty if it is not there.
    """

    key: str
    title: str
    statement: str
    source: str
    rule: str
    needs: str
    stage: Literal["training", "evaluation", "study"] = "training"
    section: str = ""
    thresholds: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    invariant: str = ""
    judge: Judge | None = None
    headline: str = ""
