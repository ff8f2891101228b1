"""Sources of the runs of a report: folders of runs, studies, folders that hold these, and projects of W&B."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_normgeo.errors import ConfigurationError, nearest_names, warn_once
from lightning_normgeo.runs.records.record import RECORD_NAME, STUDY_NAME, Record
from lightning_normgeo.runs.records.record_reader import read_records
from lightning_normgeo.utilities.contained_files import MEBIBYTE, contained_file, contained_folder, read_contained
from lightning_normgeo.utilities.files import user_path
from lightning_normgeo.utilities.plain_text import plain_line

_ONLINE = r"(wandb:)?([\w.-]+/[\w.-]+(?:/[\w.-]+)?)"
_PAGE = r"https://wandb\.ai/([\w.-]+/[\w.-]+)(?:/runs(/[\w.-]+))?(?:[/?#].*)?"
"""Address of a project or a run in a browser."""
_DEEPEST, _MOST_FOLDERS = 4, 20_000
"""Levels of folders that are searched for runs, and the largest number of folders."""
_WITHOUT_RUNS = ("checkpoints", "wandb", "wandb-data", "images", "figures", "__pycache__", "node_modules")
"""Names of folders that are not searched."""
_FEWEST_STEPS, _MOST_STEPS, _STEPS = 32, 300, 4800
"""Steps with values by layer that are read: of each run at least and at most, and of all runs together."""
_LARGEST_INDEX = 64 * MEBIBYTE
_NAMED = 8
"""Number of names that an error message lists."""
_GIVE = "Give the folder of a run that was logged with RecordLogger, or one that holds such folders"


class AbsentRun(NamedTuple):
    """A run of a study that has no record: it failed before it measured anything, or has not begun.

    Attributes:
        name: Name of the run in its study.
        status: Its status in the index of the study, such as ``failed`` or ``waiting``.
        error: Why it failed, in one line; empty if it did not.
    """

    name: str
    status: str
    error: str


def source_of(source: str | Path) -> str:
    """Return a source as a path or project of W&B, which may be given by the address of its page, too."""
    page = re.fullmatch(_PAGE, str(source))
    return f"wandb:{page[1]}{page[2] or ''}" if page else str(source)


def records_of(source: str) -> list[Record]:
    """Read the records of a source, which is a path or a project of W&B; see :func:`load_runs`.

    Raises:
        ConfigurationError: If there are none; the message says what is missing, and where.
    """
    path = user_path(source)
    if path.is_symlink() or path.exists():
        folders = folders_of(path)
        return read_records(folders, max(_FEWEST_STEPS, min(_MOST_STEPS, _STEPS // len(folders))))
    match = re.fullmatch(_ONLINE, source)
    if match is None or (match[1] is None and _is_local(source)):
        raise ConfigurationError(_missing(path))
    from lightning_normgeo.report.wandb.downloaded_records import read_project

    try:
        return read_project(match[2])
    except ConfigurationError as error:
        if match[1] is not None:
            raise
        here = f"There is no folder {source} in {Path.cwd()}."
        raise ConfigurationError(f"{here} As a project of W&B: {error}") from error


def folders_of(path: Path) -> list[Path]:
    """Return the folders of the runs at an existing path, sorted by name within each folder that is searched.

    Args:
        path: Folder or record of a run, folder or index of a study, or a folder that holds any of these.

    Raises:
        ConfigurationError: If there is no run; the message says what is there instead.
    """
    if path.name == STUDY_NAME:
        return _begun(path.parent)
    if path.is_file() and path.suffix != Path(RECORD_NAME).suffix:
        raise ConfigurationError(f"{path} is no record. {_GIVE}.")
    if not path.is_dir():
        return [path]
    if os.path.lexists(path / RECORD_NAME):
        return [path]
    if os.path.lexists(path / STUDY_NAME):
        return _begun(path)
    found = list(_within(path, _DEEPEST, left=[_MOST_FOLDERS]))
    if not found:
        raise ConfigurationError(f"{path} has no {RECORD_NAME}, up to {_DEEPEST} folders deep; {_held(path)}. {_GIVE}.")
    return found


def _within(folder: Path, deepest: int, left: list[int]) -> Iterator[Path]:
    """Yield the folders of runs below a folder; links that lead out of it are not followed.

    Args:
        folder: Folder to search.
        deepest: Number of levels to search.
        left: Number of folders that may still be visited, in a list that all levels of the search share.
    """
    for name in _folders(folder):
        left[0] -= 1
        if left[0] < 0:
            raise ConfigurationError(f"{folder} is among more than {_MOST_FOLDERS} folders. {_GIVE}, nearer to them.")
        inner = folder / name
        if _is_record(inner):
            yield inner
        elif (inner / STUDY_NAME).is_file():
            yield from _of_a_study(inner, deepest - 1, left)
        elif deepest > 1:
            yield from _within(inner, deepest - 1, left)


def _of_a_study(folder: Path, deepest: int, left: list[int]) -> Iterable[Path]:
    """Return the runs in the index of a study; if that cannot be read, the runs found in its folder."""
    try:
        return _indexed(folder)
    except ConfigurationError as error:
        warn_once(f"{error} The folders beside it are read without it.")
        return _within(folder, deepest, left) if deepest else []


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder that can hold runs."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []
    return [name for name in names if not name.startswith(".") and name not in _WITHOUT_RUNS and _is_own(folder, name)]


def _is_own(folder: Path, name: str) -> bool:
    """Whether a folder has a folder of that name that does not lead out of it."""
    try:
        contained_folder(folder, name)
    except ConfigurationError:
        return False
    return True


def _is_record(folder: Path) -> bool:
    """Whether a folder has a record, of any size."""
    try:
        contained_file(folder, RECORD_NAME, 2**63)
    except ConfigurationError:
        return False
    return True


def _begun(folder: Path) -> list[Path]:
    """Return the folders of a study's runs that have begun; raise a ConfigurationError if there are none."""
    found = _indexed(folder)
    if not found:
        raise ConfigurationError(f"No run of {folder / STUDY_NAME} has begun.")
    return found


def _indexed(folder: Path) -> list[Path]:
    """Return the folders of a study's runs that have a record, in the order of its index."""
    names = [run["name"] for run in _entries(folder)]
    return [folder / name for name in names if _is_own(folder, name) and _is_record(folder / name)]


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Return the runs in the index of a study, each with its name."""
    index = folder / STUDY_NAME
    try:
        text = read_contained(folder, STUDY_NAME, _LARGEST_INDEX).decode("utf-8")
        return [{**run, "name": run["name"]} for run in json.loads(text)["runs"]]
    except ConfigurationError as error:
        raise ConfigurationError(f"{folder}: {error}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigurationError(
            f"{index} is not the index of a study ({error!r}). Run normgeo study again."
        ) from error


def absent_runs(source: str | Path, folders: Iterable[Path]) -> list[AbsentRun]:
    """Return the runs of studies that have no record; none for a source that is a single run.

    Args:
        source: Source of a report, such as a study or a folder of studies; see :func:`load_runs`.
        folders: Folders of the runs that were found there.
    """
    path = user_path(source)
    place = path.parent if path.name == STUDY_NAME else path
    if not place.is_dir() or os.path.lexists(place / RECORD_NAME):
        return []
    studies = dict.fromkeys(folder.parent for folder in folders)
    within = [study for study in studies if study.resolve().is_relative_to(place.resolve())]
    return [run for study in within if (study / STUDY_NAME).is_file() for run in _without_record(study)]


def _without_record(study: Path) -> Iterator[AbsentRun]:
    try:
        entries = _entries(study)
    except ConfigurationError:  # said where the runs were looked for
        return
    for run in entries:
        name = run["name"]
        if not (_is_own(study, name) and _is_record(study / name)):
            yield AbsentRun(*(plain_line(str(run.get(key, ""))) for key in ("name", "status", "error")))


def _is_local(source: str) -> bool:
    """Whether a missing path is meant as a local one, because its beginning exists here."""
    return source.startswith((".", "~", "/")) or Path(source.partition("/")[0]).exists()


def _missing(path: Path) -> str:
    """Return the error message for a missing path, with the names nearest to its first missing part."""
    there = next((parent for parent in path.parents if parent.exists()), Path())
    name = path.relative_to(there).parts[0] if path.is_relative_to(there) else path.name
    try:
        names = sorted(entry.name for entry in there.iterdir() if not entry.name.startswith("."))
    except OSError:
        names = []
    place = there.absolute() if there == Path() else there
    beside = f"; {place} has {nearest_names(name, names)}" if names and path.parts else ""
    return f"{path} does not exist{beside}. {_GIVE}."


def _held(folder: Path) -> str:
    """Return a description of the content of a folder without a record."""
    try:
        names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    more = f" … ({len(names)} in all)" if len(names) > _NAMED else ""
    return f"it holds {', '.join(names[:_NAMED])}{more}" if names else "it is empty"
