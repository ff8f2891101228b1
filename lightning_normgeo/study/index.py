"""The index of a study: what its runs are, and how far each of them is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_normgeo._version import __version__
from lightning_normgeo.files import write_document
from lightning_normgeo.record import STUDY_NAME
from lightning_normgeo.run_folder import RunFolder
from lightning_normgeo.study.definition import Study

Status = Literal["waiting", "running", "finished", "failed", "interrupted"]


@dataclass
class Entry:
    """One run of a study.

    Attributes:
        name: of the run, and of its folder within the study's.
        options: what is its own among the study's options.
        status: waiting, running, finished, failed, interrupted.
        seconds: that its last attempt took.
        error: the last line that a failed run printed.
    """

    name: str
    options: dict[str, Any]
    status: Status = "waiting"
    seconds: float = 0.0
    error: str = ""


class Index:
    """The runs of a study, kept in ``study.json`` in its folder.

    Args:
        study: whose runs; what an earlier attempt left in its folder is taken up.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        known = _known(study.folder)
        self.entries = [Entry(name, options) for name, options in study.runs().items()]
        for entry in self.entries:
            before = known.get(entry.name, {})
            entry.seconds, entry.error = before.get("seconds", 0.0), before.get("error", "")
            folder = self.folder_of(entry)
            if folder.finished:
                entry.status = "finished"
            elif folder.begun:
                entry.status = "failed" if before.get("status") == "failed" else "interrupted"

    @property
    def path(self) -> Path:
        """The file."""
        return self.study.folder / STUDY_NAME

    def folder_of(self, entry: Entry) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(self.study.folder / entry.name)

    def save(self) -> None:
        """Write the file, replacing the earlier one at once."""
        self.study.folder.mkdir(parents=True, exist_ok=True)
        study = {key: value for key, value in asdict(self.study).items() if key != "save_dir"}
        runs = [asdict(entry) for entry in self.entries]
        write_document(self.path, {"version": __version__, **study, "runs": runs})


def _known(folder: Path) -> dict[str, Mapping[str, Any]]:
    try:
        document = json.loads((folder / STUDY_NAME).read_text(encoding="utf-8"))
        return {run["name"]: run for run in document["runs"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
