"""A study in the terminal: what it will run, a line for each run under way, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_normgeo.study.run_process import OUTPUT_NAME
from lightning_normgeo.study.run_progress import RunProgress
from lightning_normgeo.study.study_index import Index, IndexEntry
from lightning_normgeo.utilities.plain_text import plain_line

_HALF = ("failed", "interrupted")
_ENDED = {"finished": "[green]finished[/]", "failed": "[red]failed[/]", "interrupted": "[yellow]interrupted[/]"}


class ProgressDisplay:
    """One progress line per run under way, and one of plain text for each that begins or ends.

    Args:
        console: where it is shown; lines that move are left out where that is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, entry: IndexEntry, watch: RunProgress) -> None:
        """Show how far a run is, or how it ended."""
        if entry.status == "running":
            if entry.name not in self._tasks:
                self._tasks[entry.name] = self._progress.add_task(entry.name, total=1.0, text="")
                if not self._console.is_terminal:
                    self._say(f"{escape(plain_line(entry.name))}: begins")
            self._progress.update(self._tasks[entry.name], completed=watch.fraction, text=watch.text)
            return
        self._progress.remove_task(self._tasks.pop(entry.name))
        accuracy = f", val {100 * watch.accuracy:.1f} %" if watch.accuracy is not None else ""
        self._say(f"{escape(plain_line(entry.name))}: {_ENDED[entry.status]} after {entry.seconds:.0f} s{accuracy}")
        if entry.error:
            self._console.print(f"  {plain_line(entry.error)}", style="red", markup=False, soft_wrap=True)

    def stopping(self, count: int) -> None:
        """Say that so many runs were asked to end."""
        self._say(f"stopping {count} run{'s' * (count > 1)}; once more to stop at once")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def listing(index: Index) -> Table:
    """Return the runs of a study and how far each of them is."""
    table = Table(box=box.SIMPLE, title=f"{index.study.name}: {len(index.entries)} runs", title_justify="left")
    for name in ("run", "status"):
        table.add_column(name, overflow="fold")
    for entry in index.entries:
        table.add_row(escape(plain_line(entry.name)), ", ".join(_notes(index, entry)))
    return table


def _notes(index: Index, entry: IndexEntry) -> list[str]:
    """Return how far a run is, and what becomes of it."""
    notes: list[str] = [entry.status]
    if entry.status == "finished" and entry.error:
        notes.append(entry.error)
    if entry.status in _HALF:
        if index.would_mix(entry):
            return [*notes, "began with other settings and does not go on"]
        notes.append("goes on from its checkpoint" if index.folder_of(entry).checkpoint else "begins anew")
    if index.is_outdated(entry):
        notes.append("with other settings")
    return notes


def outdated(index: Index) -> str:
    """Return what to know about runs that had other settings than the study has now; empty if none has."""
    finished = sum(entry.status == "finished" and index.is_outdated(entry) for entry in index.entries)
    half = sum(entry.status in _HALF and index.would_mix(entry) for entry in index.entries)
    said = {
        "finished run{} had other settings than the study has now, and stay as they are. "
        "Remove their folders to run them again, or give the study another name.": finished,
        "half run{} began with other settings than the study has now: not continued. "
        "Remove their folders to begin anew, or restore the settings.": half,
    }
    return "\n".join(f"{count} {text.format('s' * (count > 1))}" for text, count in said.items() if count)


def failures(index: Index) -> Iterable[str]:
    """Return a line for each run that failed: why, and where the rest is."""
    for entry in index.entries:
        if entry.status == "failed":
            where = index.folder_of(entry).path / OUTPUT_NAME
            yield plain_line(f"{entry.name} failed: {entry.error} (all of it: {where})")
