"""What runs differ in, and what they ran on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.setting_roles import titles
from lightning_normgeo.report.tables.cells import NOTHING, named, sentences
from lightning_normgeo.report.tables.table import Cell, Table, text

_SETTINGS, _BESIDE, _BELOW, _NAMED = 20, 8, 200, 8
"""Settings that have a column; more than so few have a row each if runs are fewer; so many rows; and names in a row."""
_UNFINISHED = "not ended, or killed"


def settings_table(runs: Sequence[Run]) -> Table | None:
    """Return the settings in which runs differ, in full, whatever of them is in labels; None if they do not.

    Each run has a row. Where settings are many and more than runs, each setting has one: no screen is as wide.
    """
    names = list(runs[0].differing) if runs else []
    if not names:
        return None
    below = len(names) > max(_BESIDE, len(runs))
    shown = names[: _BELOW if below else _SETTINGS]
    left = names[len(shown) :]
    caption = sentences(
        "Settings that are the same in all runs, folders and loggers are left out.",
        "Names of runs have only what tells them apart." if below else "",
        f"{len(left)} more are left out: {', '.join(left[:_NAMED])}{' …' * (len(left) > _NAMED)}." if left else "",
    )
    title = "Settings that differ"
    if below:
        rows = [[text(name), *(_value(run.differing[name]) for run in runs)] for name in shown]
        rows.append([text("state"), *(text(_state(run)) for run in runs)])
        return Table("settings", title, caption, ["setting", *(run.name for run in runs)], rows)
    columns = list(titles(shown).values())
    rows = [[text(run.name), *(_value(run.differing[name]) for name in shown), text(_state(run))] for run in runs]
    return Table("settings", title, caption, ["run", *columns, "state"], rows)


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
