"""Table of the verdicts on all claims of the paper."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_normgeo.report.tables.cells import NOTHING, sentences
from lightning_normgeo.report.tables.table import Cell, Table, text
from lightning_normgeo.runs.verdicts.claims.claims import CLAIMS
from lightning_normgeo.runs.verdicts.verdict import Verdict

ANCHOR = "verdicts"
_COLUMNS = ["claim", "verdict", "number", "threshold", "why", "evidence", "source"]
_CAPTION = (
    "Each claim of the paper, what the runs say about it, and the number that decides. Undecided: measured, but not "
    "enough, or between the thresholds. Not tested: nothing measured; the table says what is needed. The page on "
    "verdicts in the documentation has each rule, and where its thresholds come from."
)


def verdicts_table(verdicts: Mapping[str, Verdict]) -> Table | None:
    """Return the table of verdicts, a row for each claim; None if there are none."""
    if not verdicts:
        return None
    rows = [_row(key, one) for key, one in verdicts.items()]
    return Table(ANCHOR, "Verdicts on the paper's claims", _CAPTION, _COLUMNS, rows)


def _row(key: str, one: Verdict) -> list[Cell]:
    claim = CLAIMS[key]
    number = " ".join(filter(None, (one.label, one.number))) if one.number else ""
    return [
        text(f"{claim.title}. {claim.statement}"),
        text(" in ".join(filter(None, (one.word, one.runs)))),
        text(number) if number else NOTHING,
        text(one.limit) if one.limit else NOTHING,
        text(sentences(f"{one.reason}." if one.reason else "", one.detail)),
        text(one.evidence) if one.evidence else NOTHING,
        text(claim.source),
    ]
