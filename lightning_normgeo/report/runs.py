"""Which runs a report is about, and what tells them apart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.record import RECORD_NAME, STUDY_NAME, Record, read_records

_NOT_COMPARED = ("run", "ckpt_path", "config", "wandb", "trainer.logger", "trainer.default_root_dir", "model.optimizer")
_SEEDS = ("seed_everything", "seed")
_WEIGHT_DECAY = "weight_decay"
_ONLINE = r"[\w.-]+/[\w.-]+(/[\w.-]+)?"
MISSING = "–"


@dataclass(frozen=True)
class Run:
    """One run among those of a report.

    Attributes:
        record: what it logged.
        settings: all its settings, by dotted name.
        differing: those in which the runs of the report differ, the seed included.
        panel: the normalization, if the runs differ in it; figures have a panel for each.
        series: everything else that differs but the seed, as a label; figures have a color for each.
        repeat: the seed, or what else tells runs apart that have all settings in common.
    """

    record: Record
    settings: dict[str, str]
    differing: dict[str, str]
    panel: str = ""
    series: str = ""
    repeat: str = ""

    @property
    def group(self) -> str:
        """What this run has in common with its repetitions under other seeds."""
        return ", ".join(part for part in (self.panel, self.series) if part) or "all runs"

    @property
    def name(self) -> str:
        """A label of its own."""
        parts = [part for part in (self.panel, self.series, self.repeat) if part]
        return ", ".join(parts) or self.record.folder.name

    @property
    def seeds(self) -> tuple[str, ...]:
        """Its settings that only choose random numbers."""
        return tuple(value for name, value in self.settings.items() if is_seed(name))

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
        sources: folders of runs, records, folders of studies or their ``study.json``, and ``entity/project`` or
            ``entity/project/run`` of W&B, which are asked for where there is no such folder; each run counts once.

    Raises:
        ConfigurationError: if there is none, or one of them has no record.
    """
    if not sources:
        raise ConfigurationError("There is no run to report. Give folders of runs, or of a study.")
    records = {str(record.folder.resolve()): record for source in sources for record in _records(str(source))}
    return compare_runs(list(records.values()))


def compare_runs(records: Sequence[Record]) -> list[Run]:
    """Return the runs with what tells them apart, in the order given."""
    settings = [flat(record.settings.get("config", record.settings)) for record in records]
    compared = [{k: v for k, v in one.items() if not _left_out(k)} for one in settings]
    names = dict.fromkeys(name for one in compared for name in one)
    differing = [name for name in names if len({one.get(name, MISSING) for one in compared}) > 1]
    runs = [
        Run(record, one, {name: one.get(name, MISSING) for name in differing})
        for record, one in zip(records, settings, strict=True)
    ]
    return _told_apart([_labelled(run) for run in runs])


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Return nested settings as dotted names and short texts, without empty ones."""
    if isinstance(values, Mapping):
        found: dict[str, str] = {}
        for key, value in values.items():
            found.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
        return found
    if isinstance(values, list) and any(isinstance(value, Mapping) for value in values):
        return flat({str(i): value for i, value in enumerate(values)}, prefix)
    if isinstance(values, float) and values.is_integer():
        values = int(values)  # as W&B gives it back
    return {} if values is None else {prefix: values if isinstance(values, str) else json.dumps(values)}


def is_seed(setting: str) -> bool:
    """Whether a setting only chooses random numbers."""
    return setting.rpartition(".")[2] in _SEEDS


def is_norm(setting: str) -> bool:
    """Whether a setting is the choice of a normalization."""
    return setting.rpartition(".")[2] == "norm"


def is_weight_decay(setting: str) -> bool:
    """Whether a setting is the strength of weight decay."""
    return setting.rpartition(".")[2] == _WEIGHT_DECAY


def _records(source: str) -> list[Record]:
    if not Path(source).exists() and re.fullmatch(_ONLINE, source):
        from lightning_normgeo.report.online import read_project

        return read_project(source)
    return read_records(list(_folders(Path(source))))


def _folders(source: Path) -> Iterable[Path]:
    """Return the folders of the runs that a path stands for."""
    index = source if source.name == STUDY_NAME else source / STUDY_NAME
    if not index.is_file():
        return [source]
    try:
        runs = [index.parent / run["name"] for run in json.loads(index.read_text(encoding="utf-8"))["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{index} is not the index of a study ({error!r}). Run normgeo study again."
        ) from error
    begun = [folder for folder in runs if (folder / RECORD_NAME).is_file()]
    if not begun:
        raise ConfigurationError(f"No run of {index} has begun.")
    return begun


def _left_out(setting: str) -> bool:
    return any(setting == name or setting.startswith(f"{name}.") for name in _NOT_COMPARED)


def _labelled(run: Run) -> Run:
    own = {name: value for name, value in run.differing.items() if not is_seed(name)}
    panel = [value for name, value in own.items() if is_norm(name)]
    others = [label(name, value) for name, value in own.items() if not is_norm(name)]
    seeds = [f"seed {value}" for name, value in run.differing.items() if is_seed(name)]
    return replace(run, panel=" / ".join(panel), series=", ".join(others), repeat=", ".join(seeds))


def label(setting: str, value: str) -> str:
    """Return what a setting is called in labels."""
    if is_weight_decay(setting):
        return "no weight decay" if value in ("0", "0.0") else f"weight decay {value}"
    return f"{setting.rpartition('.')[2]} {value}"


def _told_apart(runs: list[Run]) -> list[Run]:
    """Return the runs with the end of the folder's path in the label of those that have everything in common."""
    alike: dict[str, list[Path]] = {}
    for run in runs:
        alike.setdefault(run.name, []).append(run.record.folder)
    return [
        run
        if len(alike[run.name]) == 1
        else replace(run, repeat=", ".join(filter(None, (run.repeat, _end(run.record.folder, alike[run.name])))))
        for run in runs
    ]


def _end(folder: Path, folders: Sequence[Path]) -> str:
    """Return as much of the end of a path as no other path has."""
    others, parts = {f"/{other.resolve()}" for other in folders}, folder.resolve().parts
    ends = ("/".join(parts[-depth:]) for depth in range(1, len(parts) + 1))
    return next(end for end in ends if sum(other.endswith(f"/{end}") for other in others) == 1)
