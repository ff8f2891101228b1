"""The runs of a report, with the settings and labels that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.plain_records import plain_record
from lightning_normgeo.report.run_labels import Labels, numbered, told_apart
from lightning_normgeo.report.run_settings import MISSING, settings_of, without_empty
from lightning_normgeo.report.setting_roles import elided
from lightning_normgeo.report.sources import records_of, source_of
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.utilities.attack_names import is_detail
from lightning_normgeo.utilities.plain_text import plain

_LONGEST_NAME = 60
"""Characters of the longest folder name in a label."""


@dataclass(frozen=True)
class Run:
    """One of the runs of a report.

    Attributes:
        record: The record of the run, with its texts made safe to show.
        settings: All settings by dotted name.
        differing: The settings in which the runs of the report differ, seeds included.
        panel: Label of the normalization, if the runs differ in it; figures have a panel for each.
        series: Label of the other differing settings, without seeds; figures have a color for each.
        repeat: Label of the seed, or of what else tells runs with the same settings apart.
        seed_settings: Names of the differing settings that are seeds of random numbers.
        alone: Whether the report has no other run.
    """

    record: Record
    settings: dict[str, str]
    differing: dict[str, str]
    panel: str = ""
    series: str = ""
    repeat: str = ""
    seed_settings: tuple[str, ...] = ()
    alone: bool = False

    @property
    def group(self) -> str:
        """The label that the run shares with its repetitions under other seeds; its name if there is no other run."""
        label = ", ".join(part for part in (self.panel, self.series) if part)
        return label or (self.name if self.alone else "all runs")

    @property
    def name(self) -> str:
        """The label of the run, which no other run of the report has."""
        parts = [part for part in (self.panel, self.series, self.repeat) if part]
        return ", ".join(parts) or elided(plain(self.record.folder.name), _LONGEST_NAME)

    @property
    def seeds(self) -> tuple[str, ...]:
        """The values of the seeds in which the runs of the report differ."""
        return tuple(self.differing[name] for name in self.seed_settings)

    @property
    def kind(self) -> dict[str, str]:
        """The differing settings without seeds: equal for repetitions of a run, and only for them."""
        return {name: value for name, value in self.differing.items() if name not in self.seed_settings}

    @property
    def all_results(self) -> list[dict[str, Any]]:
        """The rows of all robustness evaluations, ``clean`` first; empty without an evaluation."""
        return [row for evaluation in self.record.evaluations.values() for row in evaluation.get("results", [])]

    @property
    def results(self) -> list[dict[str, Any]]:
        """The rows of all robustness evaluations without details, such as single corruptions and parts of a suite."""
        return [row for row in self.all_results if not is_detail(row)]

    @property
    def evaluated_parts(self) -> dict[str, dict[str, Any]]:
        """The documents of the evaluations, of each loader by the ending of its attacks' names."""
        parts: dict[str, dict[str, Any]] = {}
        for name, found in self.record.evaluations.items():
            own = f"/{name}" if name else ""
            parts |= found.get("loaders", {own: found})
        return parts

    def evaluation_settings(self, loader: str) -> dict[str, Any]:
        """Return the settings of the evaluation on one test loader.

        Args:
            loader: Ending of its attacks' names, as :func:`split_attack` returns it; begins with the name of the
                evaluation if that has one.
        """
        evaluations = self.record.evaluations
        name = loader.strip("/").partition("/")[0]
        found = evaluations.get(name) or evaluations.get("", {})
        settings: dict[str, Any] = found.get("loaders", {}).get(loader, found).get("settings", {})
        return settings


def load_runs(sources: Sequence[str | Path]) -> list[Run]:
    """Read the runs of a report.

    Args:
        sources: Folders of runs, records, folders of studies or their ``study.json``, folders that hold any of these up
            to four folders deep, and ``entity/project`` or ``entity/project/run`` of W&B. W&B is asked only if there is
            no such folder, and always for ``wandb:entity/project`` and for the address of its page,
            ``https://wandb.ai/entity/project``. A run that is found twice is read once.

    Raises:
        ConfigurationError: If there are no runs, or a source has no record.
    """
    if not sources:
        raise ConfigurationError("There is no run to report. Give folders of runs, or of a study.")
    found = [records_of(source_of(source)) for source in sources]
    records = {str(record.folder.resolve()): record for some in found for record in some}
    return compare_runs(list(records.values()))


def compare_runs(records: Sequence[Record]) -> list[Run]:
    """Return runs with the settings and labels that tell them apart.

    Args:
        records: Records of the runs; the order stays.
    """
    settings = [settings_of(record.settings) for record in records]
    names = dict.fromkeys(name for _, compared in settings for name in compared)
    values = {name: [compared.get(name, MISSING) for _, compared in settings] for name in names}
    differing = without_empty({name: values[name] for name in names if len(set(values[name])) > 1})
    runs = [
        Run(plain_record(record), every, {name: values[name][k] for name in differing}, alone=len(records) == 1)
        for k, (record, (every, _)) in enumerate(zip(records, settings, strict=True))
    ]
    labels = Labels([run.differing for run in runs], [run.record.folder for run in runs])
    runs = [
        replace(run, panel=panel, series=series, repeat=repeat, seed_settings=tuple(labels.seeds))
        for run, panel, series, repeat in zip(runs, labels.panels, labels.series, labels.repeats, strict=True)
    ]
    return _told_apart(runs)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with different names, by the ends of their folders' paths or numbers where needed."""
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
