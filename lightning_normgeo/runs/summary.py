"""Summary of a run on one screen: verdicts, geometry at the first and last measured step, and accuracies."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_normgeo.runs.quantities.table import QUANTITIES
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.records.record_lines import VALIDATION
from lightning_normgeo.runs.records.record_reader import read_record
from lightning_normgeo.runs.run_title import run_title
from lightning_normgeo.runs.verdicts.claims.claims import CLAIMS
from lightning_normgeo.runs.verdicts.optimizers import eq16_applies
from lightning_normgeo.runs.verdicts.run_verdicts import verdicts
from lightning_normgeo.runs.verdicts.verdict import NOT_APPLICABLE, NOT_TESTED, REFUTED, SUPPORTED, UNDECIDED, WORDS
from lightning_normgeo.utilities.attack_names import attack_title, is_detail
from lightning_normgeo.utilities.plain_text import plain_line

_SUMMARY = {quantity.key: quantity.summary for quantity in QUANTITIES.values() if quantity.summary}
"""Lines of the summary by metric key."""
_EQ16, _WITH_MOMENTUM = "norm_growth/predicted", "norm_growth/predicted_momentum"
_NAMED = ("orthogonality/", "affine/")
"""Prefixes of quantities for which the layer with the largest value is shown: a large value is remarkable there."""
_STYLES = {SUPPORTED: "green", REFUTED: "red", UNDECIDED: "yellow", NOT_APPLICABLE: "dim"}
_WIDTH = 100


def summarize(run: str | Path | Record) -> str:
    """Return the summary of a run as text, with the run's folder, as ``normgeo fit`` prints it at its end.

    Args:
        run: Folder of a run that was logged with RecordLogger, or its record.

    Raises:
        ConfigurationError: If there is no record.

    Example:
        >>> from lightning_normgeo.runs.records.record import Record
        >>> text = summarize(Record(Path("run"), metrics={"norm_growth/weight_norm": [(4, 2.0), (9, 2.5)]}))
        >>> "step 4" in text and "step 9" in text
        True
    """
    record = run if isinstance(run, Record) else read_record(run)
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(summary_table(record))
    lines = [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
    return "\n".join([*lines, f"record: {record.folder.absolute()}"])


def summary_table(record: Record) -> Group:
    """Return the summary of a run for a console of rich: verdicts, geometry, notes on it, and the accuracies."""
    title = run_title(record)
    parts: list[RenderableType] = [Text(title, style="bold")] if title else []
    if record.diverged is not None:
        parts.append(Text(plain_line(f"The run {record.diverged}."), style="bold red"))
    judged = _verdicts(record)
    if judged.row_count > 1:
        parts += [judged, Text("")]
    geometry = _geometry(record)
    if geometry.row_count:
        parts += [geometry, Text("")]
    notes = [Text(f"  {plain_line(note)}", style="yellow") for note in _notes(record)]
    if notes:
        parts += [*notes, Text("")]
    accuracies = _accuracies(record)
    if accuracies.row_count:
        parts += [accuracies, Text("")]
    if not geometry.row_count and not accuracies.row_count:
        parts.append(Text("Nothing was measured or evaluated in this run."))
    return Group(*parts)


def _verdicts(record: Record) -> Table:
    """Return a line for each claim that the run tests, and one for all others."""
    table = Table(title="Verdicts", box=None, title_justify="left", show_header=False, padding=(0, 1), pad_edge=False)
    found = verdicts(record)
    tested = {key: one for key, one in found.items() if one.word != NOT_TESTED}
    table.add_column("", no_wrap=True, min_width=max(map(len, WORDS)))
    table.add_column(
        "", style="bold", no_wrap=True, min_width=max((len(CLAIMS[key].title) for key in tested), default=0)
    )
    table.add_column("", no_wrap=True, overflow="ellipsis")
    for key, one in tested.items():
        table.add_row(Text(one.word, style=_STYLES[one.word]), CLAIMS[key].title, Text(plain_line(one.phrase)))
    others = f"{len(found) - len(tested)} other claims"
    table.add_row(Text(NOT_TESTED, style="dim"), others, Text("the report says what each of them needs", style="dim"))
    return table


def _geometry(record: Record) -> Table:
    table = Table(title="Geometry", box=box.SIMPLE, show_edge=False, title_justify="left")
    table.add_column("")
    points = {key: record.points(key) for key in _shown(record)}
    measured = {key: found for key, found in points.items() if found}
    steps = [step for found in measured.values() for step, _ in (found[0], found[-1])]
    for step in (min(steps, default=0), max(steps, default=0)):
        table.add_column(f"step {step}", justify="right")
    table.add_column("largest in")
    for key, found in measured.items():
        values = (f"{found[0][1]:.4g}", f"{found[-1][1]:.4g}")
        table.add_row(Text(_SUMMARY[key]), *values, Text(plain_line(_largest_layer(record, key))))
    return table


def _shown(record: Record) -> list[str]:
    """Return the keys of the quantities to show: the prediction of eq 16 if it applies, else that with momentum."""
    hidden = _WITH_MOMENTUM if eq16_applies(record) else _EQ16
    return [key for key in _SUMMARY if key != hidden]


def _largest_layer(record: Record, key: str) -> str:
    """Return the layer with the largest value at the last step; empty if that would not be informative."""
    points = record.layers.get(key, [])
    last = points[-1][1] if points else {}
    values = {layer: value for layer, value in last.items() if math.isfinite(value)}
    if not key.startswith(_NAMED) or len(values) < 2:
        return ""
    return max(values, key=lambda layer: abs(values[layer]))


def _notes(record: Record) -> Iterator[str]:
    """Yield a note for each reason for which measurements were skipped."""
    left_out = record.observed.get("left_out")
    if isinstance(left_out, Mapping):
        for reason, count in left_out.items():
            yield f"left out {count} x: {reason}"


def _accuracies(record: Record) -> Table:
    table = Table(title="Robustness", box=box.SIMPLE, show_edge=False, title_justify="left")
    for name in ("attack", "accuracy", "95 % interval", "drop", "n"):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for found in record.evaluations.values():
        ending = ", validation data" if found.get("data") == VALIDATION else ""
        for row in found.get("results", []):
            if not is_detail(row):
                table.add_row(Text(plain_line(attack_title(row["attack"]) + ending)), *_cells(row))
    for found in record.evaluations.values():
        if isinstance(found.get("corruptions"), Mapping):
            table.add_row("corruptions, mean", *_cells({**found["corruptions"], "accuracy_drop": math.nan}))
        for attack, reason in found.get("not_evaluated", {}).items():
            table.add_row(Text(plain_line(attack)), "not evaluated", Text(plain_line(reason)))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of an accuracy with its interval and drop; "none" for an attack on no samples."""
    known = all(isinstance(row.get(key), (int, float)) for key in ("accuracy", "ci_low", "ci_high", "accuracy_drop"))
    if not known:
        return ["none", "", "", str(row.get("n", 0))]
    return [
        f"{100 * row['accuracy']:.2f} %",
        f"{100 * row['ci_low']:.1f} … {100 * row['ci_high']:.1f} %",
        "" if math.isnan(row["accuracy_drop"]) else f"{100 * row['accuracy_drop']:.2f} pt",
        str(row["n"]),
    ]
