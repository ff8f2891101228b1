"""The index of a study: what its runs are, and how far each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_normgeo._version import __version__
from lightning_normgeo.runs.record import STUDY_NAME
from lightning_normgeo.runs.run_folder import RunFolder
from lightning_normgeo.study.definition import Study
from lightning_normgeo.utilities.files import parsed, write_document

Status = Literal["waiting", "running", "finished", "failed", "interrupted"]


@dataclass
class IndexEntry:
    """One run of a study.

    Attributes:
        name: of the run, and of its folder within the study's.
        options: what is its own among the study's options.
        status: waiting, running, finished, failed, interrupted.
        seconds: that its last attempt took.
        error: what went wrong, in one line; also of a run that finished, but diverged.
        digest: of everything it was told when it last began; see :meth:`Study.digest`.
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
        study: whose runs; what an earlier attempt left in its folder is taken up.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        known = _known(study.folder)
        self.entries = [IndexEntry(name, options) for name, options in study.runs().items()]
        for entry in self.entries:
            self._take_up(entry, known.get(entry.name, {}))

    @property
    def path(self) -> Path:
        """The file."""
        return self.study.folder / STUDY_NAME

    def folder_of(self, entry: IndexEntry) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(self.study.folder / entry.name)

    def is_outdated(self, entry: IndexEntry) -> bool:
        """Whether a run began with other settings than the study has now."""
        return entry.digest not in ("", self.study.digest(entry.options))

    def would_mix(self, entry: IndexEntry) -> bool:
        """Whether a run, if it went on, would be one of two settings: its checkpoint's, and the study's."""
        return self.is_outdated(entry) and self.folder_of(entry).checkpoint is not None

    def save(self) -> None:
        """Write the file, replacing the earlier one at once."""
        study = {key: value for key, value in asdict(self.study).items() if key != "save_dir"}
        runs = [asdict(entry) for entry in self.entries]
        write_document(self.path, {"version": __version__, **study, "runs": runs})

    def _take_up(self, entry: IndexEntry, before: Mapping[str, Any]) -> None:
        folder, failed = self.folder_of(entry), before.get("status") == "failed"
        if folder.finished:
            entry.status = "finished"
        elif folder.in_use:  # a process that outlived whoever started it
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
    """Return the runs of an earlier index; nothing of one that cannot be read, as the runs speak for themselves."""
    try:
        runs = parsed((folder / STUDY_NAME).read_bytes())["runs"]
        return {run["name"]: run for run in runs if isinstance(run, dict) and isinstance(run.get("name"), str)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
