"""Finding, one claim and the number that decides it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One claim, and what the run shows about it.

    Attributes:
        topic: Name of the claim in a few words.
        number: The number that decides it, formatted.
        quantity: Text on what the number is, in a few words.
        detail: Sentence on how to judge it; empty if the number says everything.
        section: Name of the section of the report that shows it.
        value: The number itself; NaN if ``number`` is a word.
        of_several: The quantity in words that fit several runs whose ``quantity`` differs.
        headline: Name of the value in the summary that W&B's table of runs shows; empty if it is not there.
    """

    topic: str
    number: str
    quantity: str
    detail: str = ""
    section: str = ""
    value: float = math.nan
    of_several: str = ""
    headline: str = ""
