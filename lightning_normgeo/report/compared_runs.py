"""Which runs a report is about, and what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.plain_records import shown
from lightning_normgeo.report.run_labels import Labels, numbered, told_apart
from lightning_normgeo.report.run_settings import MISSING, settings_of, without_empty
from lightning_normgeo.report.setting_roles import elided
from lightning_normgeo.report.sources import records_of
from lightning_normgeo.runs.record import Record
from lightning_normgeo.utilities.plain_text import plain

_LONGEST_NAME = 60


@dataclass(frozen=True)
class Run:
    """One run among those of a report.

    Attributes:
        record: what it logged, its texts as they can be shown.
        settings: all its settings, by dotted name.
        differing: those in which the runs of the report differ, the seed included.
        panel: the normalization, if the runs differ in it; figures have a panel for each.
        series: what else differs but the seed, as a label; figures have a color for each.
        repeat: the seed, or what else tells runs apart that have all settings in common.
        seed_settings: the names of those in which runs differ that only choose random numbers.
    """

    record: Record
    settings: dict[str, str]
    differing: dict[str, str]
    panel: str = ""
    series: str = ""
    repeat: str = ""
    seed_settings: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """What this run has in common with its repetitions under other seeds."""
        return ", ".join(part for part in (self.panel, self.series) if part) or "all runs"

    @property
    def name(self) -> str:
        """A label of its own."""
        parts = [part for part in (self.panel, self.series, self.repeat) if part]
        return ", ".join(parts) or elided(plain(self.record.folder.name), _LONGEST_NAME)

    @property
    def seeds(self) -> tuple[str, ...]:
        """Its values of the settings that only choose random numbers, as far as runs differ in them."""
        return tuple(self.differing[name] for name in self.seed_settings)

    @property
    def kind(self) -> dict[str, str]:
        """Its values of the other settings in which runs differ: the same for repetitions, and only for them."""
        return {name: value for name, value in self.differing.items() if name not in self.seed_settings}

    @property
    def results(self) -> list[dict[str, Any]]:
        """The rows of its robustness evaluations, ``clean`` first; none without one."""
        return [row for evaluation in self.record.evaluations.values() for row in evaluation.get("results", [])]

    def evaluation_settings(self, loader: str) -> dict[str, Any]:
        """Return what decided the results of a loader.

        Args:
            loader: what its attacks' names end in, with the evaluation's name in front where it has one.
        """
        evaluations = self.record.evaluations
        name = loader.strip("/").partition("/")[0]
        found = evaluations.get(name) or evaluations.get("", {})
        settings: dict[str, Any] = found.get("loaders", {}).get(loader, found).get("settings", {})
        return settings


def load_runs(sources: Sequence[str | Path]) -> list[Run]:
    """Read the runs of a report.

    Args:
        sources: folders of runs, records, folders of studies or their ``study.json``, folders that hold any of these up
            to four folders deep, and ``entity/project`` or ``entity/project/run`` of W&B, which is asked where there is
            no such folder; ``wandb:entity/project`` whether or not there is one. Each run counts once.

    Raises:
        ConfigurationError: if there is none, or one of them has no record.
    """
    if not sources:
        raise ConfigurationError("There is no run to report. Give folders of runs, or of a study.")
    records = {str(record.folder.resolve()): record for source in sources for record in records_of(str(source))}
    return compare_runs(list(records.values()))


def compare_runs(records: Sequence[Record]) -> list[Run]:
    """Return the runs with what tells them apart, in the order given."""
    settings = [settings_of(record.settings) for record in records]
    names = dict.fromkeys(name for _, compared in settings for name in compared)
    values = {name: [compared.get(name, MISSING) for _, compared in settings] for name in names}
    differing = without_empty({name: values[name] for name in names if len(set(values[name])) > 1})
    runs = [
        Run(shown(record), every, {name: values[name][k] for name in differing})
        for k, (record, (every, _)) in enumerate(zip(records, settings, strict=True))
    ]
    labels = Labels([run.differing for run in runs])
    runs = [
        replace(run, panel=panel, series=series, repeat=repeat, seed_settings=tuple(labels.seeds))
        for run, panel, series, repeat in zip(runs, labels.panels, labels.series, labels.repeats, strict=True)
    ]
    return _told_apart(runs)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with names of their own."""
    folders = [run.record.folder for run in runs]
    names = [", ".join((run.group, run.repeat)) for run in runs]
    repeats = (
        told_apart(names, [run.repeat for run in runs], folders) if len(runs) > 1 else [run.repeat for run in runs]
    )
    apart = [replace(run, repeat=repeat) for run, repeat in zip(runs, repeats, strict=True)]
    again = numbered([run.name for run in apart])
    return [
        run if name == run.name else replace(run, repeat=f"{run.repeat}{name.removeprefix(run.name)}")
        for run, name in zip(apart, again, strict=True)
    ]
