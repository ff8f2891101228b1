"""What runs differ in, and what they ran on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from lightning_normgeo.report.runs import Run
from lightning_normgeo.report.table import Cell, Table, text
from lightning_normgeo.report.tables.cells import NOTHING, named, sentences

_SETTINGS = 20
_UNFINISHED = "not ended, or killed"


def settings_table(runs: Sequence[Run]) -> Table | None:
    """Return a row for each run with the settings in which runs differ; None if they do not."""
    names = list(runs[0].differing) if runs else []
    if not names:
        return None
    shown = names[:_SETTINGS]
    short = [name.rpartition(".")[2] for name in shown]
    columns = [last if short.count(last) == 1 else name for name, last in zip(shown, short, strict=True)]
    rows = [[text(run.name), *(_value(run.differing[name]) for name in shown), text(_state(run))] for run in runs]
    cut = f"{len(names) - _SETTINGS} more are left out: {', '.join(names[_SETTINGS:])}." if names != shown else ""
    caption = sentences("Settings that are the same in all runs, folders and loggers are left out.", cut)
    return Table("settings", "Settings that differ", caption, ["run", *columns, "state"], rows)


def environment_table(runs: Sequence[Run]) -> Table | None:
    """Return versions, hardware and times, with a column for each environment that runs had."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run.record.environment.items())), []).append(run)
    if not any(groups):
        return None
    names = dict.fromkeys(name for run in runs for name in run.record.environment)
    members = list(groups.values())
    rows = [[text(name), *(text(of[0].record.environment.get(name, NOTHING.text)) for of in members)] for name in names]
    rows.append(
        [
            text("begun (UTC)"),
            *(text(_span(map(_begun, sorted(of, key=lambda run: run.record.begun)))) for of in members),
        ]
    )
    rows.append([text("took"), *(text(_span(map(_took, sorted(of, key=_seconds)))) for of in members)])
    columns = [f"all {len(runs)} runs" if len(runs) > 1 else runs[0].name]
    if len(members) > 1:
        columns = [named(run.name for run in of) for of in members]
    caption = (
        "Of the last process that wrote each record. A run took from its first line to its last, pauses included; that "
        "is no measure of cost where runs shared a machine."
    )
    return Table("environment", "Versions and hardware", caption, ["item", *columns], rows)


def _value(value: str) -> Cell:
    try:
        return Cell(value, float(value))
    except ValueError:
        return text(value)


def _state(run: Run) -> str:
    ended = "ended" if run.record.complete else _UNFINISHED
    return "; ".join([ended, *([str(run.record.diverged)] if run.record.diverged else [])])


def _span(values: Iterable[str]) -> str:
    found = list(values)
    return found[0] if len(set(found)) == 1 else f"{found[0]} … {found[-1]}"


def _begun(run: Run) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.record.begun))


def _seconds(run: Run) -> float:
    return run.record.ended - run.record.begun


def _took(run: Run) -> str:
    seconds = round(_seconds(run))
    minutes, hours = seconds // 60 % 60, seconds // 3600
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds % 60:02} s" if minutes else f"{seconds} s"
    )
