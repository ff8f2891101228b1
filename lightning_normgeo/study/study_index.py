"""Index of a study: its runs with their states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_normgeo._version import __version__
from lightning_normgeo.runs.folders.run_folder import RunFolder
from lightning_normgeo.runs.records.record import STUDY_NAME
from lightning_normgeo.study.definition import Study
from lightning_normgeo.utilities.files import parsed, write_document

Status = Literal["waiting", "running", "finished", "failed", "interrupted"]


@dataclass
class IndexEntry:
    """One run of a study.

    Attributes:
        name: Name of the run, and of its folder within the study's.
        options: Grid options of the run.
        status: ``waiting``, ``running``, ``finished``, ``failed`` or ``interrupted``.
        seconds: Duration of its last attempt.
        error: Why it failed, in one line; for a finished run, that it diverged.
        digest: Hash of everything that it was told when it last began; see :meth:`Study.digest`.
    """

    name: str
    options: dict[str, Any]
    status: Status = "waiting"
    seconds: float = 0.0
    error: str = ""
    digest: str = ""


class Index:
    """The runs of a study, kept in ``study.json`` in its folder.

    Args:
        study: The study. The states of its runs are read from its folder and from an earlier index.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        known = _known(study.folder)
        self.entries = [IndexEntry(name, options) for name, options in study.runs().items()]
        for entry in self.entries:
            self._take_up(entry, known.get(entry.name, {}))

    @property
    def path(self) -> Path:
        """The path of the index file."""
        return self.study.folder / STUDY_NAME

    def folder_of(self, entry: IndexEntry) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(self.study.folder / entry.name)

    def is_outdated(self, entry: IndexEntry) -> bool:
        """Whether a run began with other settings than the study has now."""
        return entry.digest not in ("", self.study.digest(entry.options))

    def would_mix(self, entry: IndexEntry) -> bool:
        """Whether resuming a run would mix two settings: those of its checkpoint, and those of the study."""
        return self.is_outdated(entry) and self.folder_of(entry).checkpoint is not None

    def save(self) -> None:
        """Write the index file, atomically replacing an earlier one."""
        study = {key: value for key, value in asdict(self.study).items() if key != "save_dir"}
        runs = [asdict(entry) for entry in self.entries]
        write_document(self.path, {"version": __version__, **study, "runs": runs})

    def _take_up(self, entry: IndexEntry, before: Mapping[str, Any]) -> None:
        """Set the state of a run from its folder and its entry in an earlier index."""
        folder = self.folder_of(entry)
        failed = before.get("status") == "failed"
        if folder.finished:
            entry.status = "finished"
        elif folder.in_use:  # its process outlived the command that started it
            entry.status = "running"
        elif failed or folder.begun:
            entry.status = "failed" if failed else "interrupted"
        else:
            return
        seconds = before.get("seconds")
        entry.seconds = float(seconds) if isinstance(seconds, (int, float)) else 0.0
        entry.digest = str(before.get("digest", ""))
        entry.error = str(before.get("error", "")) if failed else folder.divergence


def _known(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the runs of an earlier index by name; none if it is damaged, since the folders tell the states too."""
    try:
        runs = parsed((folder / STUDY_NAME).read_bytes())["runs"]
        return {run["name"]: run for run in runs if isinstance(run, dict) and isinstance(run.get("name"), str)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
