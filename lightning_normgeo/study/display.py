"""Terminal output of a study: the list of its runs, their progress, and their failures."""

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

_UNFINISHED = ("failed", "interrupted")
_ENDED = {"finished": "[green]finished[/]", "failed": "[red]failed[/]", "interrupted": "[yellow]interrupted[/]"}


class ProgressDisplay:
    """Shows a progress bar for each run under way, and prints a line for each run that begins or ends.

    Args:
        console: Console to print on; without a terminal there are no progress bars.
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
        """Display the progress of a run, or how it ended.

        Args:
            entry: Entry of the run in the study's index.
            watch: Progress of the run.
        """
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
        """Print that ``count`` runs were asked to end."""
        plural = "s" if count > 1 else ""
        self._say(f"stopping {count} run{plural}; interrupt again to stop at once")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def listing(index: Index) -> Table:
    """Return a table of a study's runs with their states."""
    table = Table(box=box.SIMPLE, title=f"{index.study.name}: {len(index.entries)} runs", title_justify="left")
    for name in ("run", "status"):
        table.add_column(name, overflow="fold")
    for entry in index.entries:
        table.add_row(escape(plain_line(entry.name)), ", ".join(_notes(index, entry)))
    return table


def _notes(index: Index, entry: IndexEntry) -> list[str]:
    """Return the status of a run, and notes on how it will resume."""
    notes: list[str] = [entry.status]
    if entry.status == "finished" and entry.error:
        notes.append(entry.error)
    if entry.status in _UNFINISHED:
        if index.would_mix(entry):
            return [*notes, "began with other settings and is not resumed"]
        notes.append("resumes from its checkpoint" if index.folder_of(entry).checkpoint else "begins anew")
    if index.is_outdated(entry):
        notes.append("with other settings")
    return notes


def outdated(index: Index) -> str:
    """Return warnings about runs that began with other settings than the study has now; empty if there are none."""
    finished = sum(entry.status == "finished" and index.is_outdated(entry) for entry in index.entries)
    unfinished = sum(entry.status in _UNFINISHED and index.would_mix(entry) for entry in index.entries)
    warnings = {
        "finished run{} had other settings than the study has now, and stay as they are. "
        "Remove their folders to run them again, or give the study another name.": finished,
        "unfinished run{} began with other settings than the study has now: not resumed. "
        "Remove their folders to begin anew, or restore the settings.": unfinished,
    }
    return "\n".join(f"{count} {text.format('s' if count > 1 else '')}" for text, count in warnings.items() if count)


def failures(index: Index) -> Iterable[str]:
    """Yield a line for each failed run, with its error and the path of its whole output."""
    for entry in index.entries:
        if entry.status == "failed":
            where = index.folder_of(entry).path / OUTPUT_NAME
            yield plain_line(f"{entry.name} failed: {entry.error} (all of it: {where})")
