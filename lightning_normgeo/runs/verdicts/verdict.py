"""Verdict, the outcome of one claim in one run or study, with the number that decides it."""

from __future__ import annotations

import math
from dataclasses import dataclass

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
NOT_TESTED, NOT_APPLICABLE = "not tested", "not applicable"
WORDS = (SUPPORTED, REFUTED, UNDECIDED, NOT_TESTED, NOT_APPLICABLE)
"""Words of verdicts, in the order in which they are listed."""
DECIDED = (SUPPORTED, REFUTED)
"""Words by which a claim is decided."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one claim.

    Attributes:
        word: One of :data:`WORDS`.
        label: Short name of the number that decides the claim.
        number: That number, formatted; empty if there is none.
        limit: The threshold in a few words, such as "limit 1e-04".
        reason: Few words on why the claim is not decided, or not applicable; empty if it is decided.
        detail: Sentences on what else belongs to the number: what was compared, what holds instead, what is needed.
        evidence: Metric keys with the steps at which they were measured, or the counts that were compared.
        value: The number itself; NaN if there is none.
        p_value: Of the test that decided, adjusted for all tests of the same table; NaN without a test.
        runs: Number of runs with this verdict in words, such as "7 of 8 runs"; empty for a single run.
        steps: Number of measured steps that the number is made from; None for an evaluation.
    """

    word: str
    label: str = ""
    number: str = ""
    limit: str = ""
    reason: str = ""
    detail: str = ""
    evidence: str = ""
    value: float = math.nan
    p_value: float = math.nan
    runs: str = ""
    steps: int | None = None

    @property
    def phrase(self) -> str:
        """The verdict in one short line: the number with its limit, or the reason why there is no decision."""
        number = f"{self.label} {self.number}".strip() if self.number else ""
        if self.word in DECIDED:
            return f"{number} ({self.limit})" if self.limit else number
        return ": ".join(filter(None, (number if self.word == UNDECIDED else "", self.reason)))
