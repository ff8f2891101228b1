"""Tables of the settings in which runs differ, and of their versions and hardware."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.setting_roles import titles
from lightning_normgeo.report.tables.cells import NOTHING, named, sentences
from lightning_normgeo.report.tables.table import Cell, Table, text

_SETTINGS = 20
"""Largest number of settings that have a column each."""
_BESIDE = 8
"""Number of settings above which they have a row each, if there are fewer runs than settings."""
_BELOW = 200
"""Largest number of settings that have a row each."""
_NAMED = 8
"""Number of settings without a place that the caption names."""
_UNFINISHED = "not ended, or killed"


def settings_table(runs: Sequence[Run]) -> Table | None:
    """Return a table of the settings in which runs differ, also those that labels leave out; None if there are none.

    Each run has a row. If there are many settings and fewer runs, each setting has a row instead, to fit the screen.
    """
    names = list(runs[0].differing) if runs else []
    if not names:
        return None
    below = len(names) > max(_BESIDE, len(runs))
    shown = names[: _BELOW if below else _SETTINGS]
    left = names[len(shown) :]
    ellipsis = " …" if len(left) > _NAMED else ""
    caption = sentences(
        "Settings that are the same in all runs, folders and loggers are left out.",
        "Names of runs have only what tells them apart." if below else "",
        f"{len(left)} more are left out: {', '.join(left[:_NAMED])}{ellipsis}." if left else "",
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
    """Return a table of versions, hardware and times, with a column for each environment; None if none is known."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run.record.environment.items())), []).append(run)
    if not any(groups):
        return None
    names = dict.fromkeys(name for run in runs for name in run.record.environment)
    members = list(groups.values())
    known = [group[0].record.environment for group in members]
    rows = [[text(name), *(text(found.get(name, NOTHING.text)) for found in known)] for name in names]
    begun = [_span(map(_begun, sorted(group, key=lambda run: run.record.begun))) for group in members]
    took = [_span(map(_took, sorted(group, key=_seconds))) for group in members]
    rows.append([text("begun (UTC)"), *map(text, begun)])
    rows.append([text("took"), *map(text, took)])
    columns = [f"all {len(runs)} runs" if len(runs) > 1 else runs[0].name]
    if len(members) > 1:
        columns = [named(run.name for run in group) for group in members]
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
    """Return whether a run ended, and whether it diverged, in words."""
    ended = "ended" if run.record.complete else _UNFINISHED
    diverged = run.record.diverged
    return ended if diverged is None else f"{ended}; {diverged}"


def _span(values: Iterable[str]) -> str:
    """Return the first and the last of sorted texts, or the only one if all are the same."""
    found = list(values)
    return found[0] if len(set(found)) == 1 else f"{found[0]} … {found[-1]}"


def _begun(run: Run) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.record.begun))


def _seconds(run: Run) -> float:
    return run.record.ended - run.record.begun


def _took(run: Run) -> str:
    """Return the duration of a run in its two largest units."""
    seconds = round(_seconds(run))
    minutes, hours = seconds // 60 % 60, seconds // 3600
    if hours:
        return f"{hours} h {minutes:02} min"
    if minutes:
        return f"{minutes} min {seconds % 60:02} s"
    return f"{seconds} s"
