"""Disk space that a study will take, and whether its disk has it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from rich.filesize import decimal

from lightning_normgeo.study.study_index import Index

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from lightning_normgeo.study.run_sizes import RunSize


class SizedCase(Protocol):
    """The size of a run in which one option of the grid has another value than in the first run."""

    @property
    def option(self) -> str:
        """The option; empty for the first run."""

    @property
    def value(self) -> Any:
        """Its value."""

    @property
    def size(self) -> RunSize:
        """Size of the run."""


class DiskNeeds:
    """Bytes that the runs of a study will write.

    Every value of the grid was sized once, the others as in the first run. The size of any other run is the first one's
    times the ratios of its values: exact where options act on different factors, as epochs and optimizers do.

    Args:
        index: Index of the study.
        cases: The sized cases, the first run first.
        jobs: Number of concurrent runs.
    """

    def __init__(self, index: Index, cases: Sequence[SizedCase], jobs: int = 1) -> None:
        self._index, self._cases, self._jobs = index, cases, jobs
        self._first = cases[0].size

    def lines(self) -> Iterator[str]:
        """Yield lines that say the sizes of a run and of all runs, and the free disk space."""
        count = len(self._index.entries)
        sizes = [case.size for case in self._cases]
        if any(size.steps is None for size in sizes):
            yield (
                "measured steps: unknown, since the data says its size only when it is loaded, or training is "
                f"unlimited. record: {decimal(round(self._first.record))} per measured step"
            )
        else:
            records = [self._record(entry) for entry in self._index.entries]
            yield (
                f"measured steps: {_span(size.measured for size in sizes)} of {_span(size.steps for size in sizes)} "
                f"per run. records: about {_span(map(round, records), decimal)} per run, "
                f"{decimal(round(sum(records)))} for {count} runs"
            )
        keep = self._index.study.keep_optimizer_states
        left = sum(map(self._checkpoints, self._index.entries))
        yield (
            f"checkpoints: {self._first.files} × {decimal(round(self._first.checkpoint))} per run while it trains, "
            f"{'kept' if keep else decimal(round(self._first.weights)) + ' each without optimizer states'} when it has "
            f"finished; {decimal(round(left))} for {count} runs"
        )
        yield f"disk: {decimal(round(self.needed))} needed by unfinished runs, {decimal(self.free)} free"

    @property
    def warning(self) -> str:
        """Warning that the disk has too little space; empty if it has enough."""
        if self.needed <= self.free:
            return ""
        return (
            f"The disk of {self._index.study.folder} has {decimal(self.free)} free and the study needs about "
            f"{decimal(round(self.needed))}. Make room, set save_dir, or let ModelCheckpoint keep fewer files."
        )

    @property
    def needed(self) -> float:
        """Bytes that unfinished runs will write, with the optimizer states of those that train at the same time."""
        left = [entry for entry in self._index.entries if entry.status != "finished"]
        training = max((self._ratio(entry, "checkpoint") * (self._first.files + 1) for entry in left), default=0.0)
        records = 0.0 if self._first.steps is None else sum(map(self._record, left))
        return records + sum(map(self._checkpoints, left)) + training * min(self._jobs, len(left))

    @property
    def free(self) -> int:
        """Free bytes on the disk of the study's folder, or of the nearest folder above that exists."""
        folder = self._index.study.folder.absolute()
        return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free

    def _record(self, entry: Any) -> float:
        return self._ratio(entry, "record")

    def _checkpoints(self, entry: Any) -> float:
        """Return the bytes of a finished run's checkpoints."""
        kept = "checkpoint" if self._index.study.keep_optimizer_states else "weights"
        return self._ratio(entry, "files") * self._ratio(entry, kept)

    def _ratio(self, entry: Any, name: str) -> float:
        """Return an attribute of a run's size: the first run's times the ratio of each of its values."""
        first = getattr(self._first, name)
        own = [case.size for case in self._cases[1:] if entry.options.get(case.option) == case.value]
        return float(first * prod(getattr(size, name) / first for size in own)) if first else 0.0


def _span(numbers: Iterable[Any], written: Callable[[int], str] = "{:,}".format) -> str:
    """Return the smallest and the largest of some numbers as they are written, or their only value."""
    found = sorted(set(numbers))
    return " to ".join(dict.fromkeys(written(number) for number in (found[0], found[-1])))
