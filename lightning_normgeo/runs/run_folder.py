"""A run with a folder of its own choice: who writes it, how far it is, and where it goes on."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_normgeo.errors import ConfigurationError, is_rank_zero
from lightning_normgeo.runs.record import FINISHED_NAME, RECORD_NAME, NotFinite, read_record
from lightning_normgeo.utilities.files import parsed

NEWEST = "resume-"
"""What the names of checkpoints begin with that are for going on only."""
DIVERGED = "diverged"
"""The status of a run that went to its end with losses that are not finite; else it is ``finished``."""
_WAITING = ".next"
_LOCK = ".lock"
_PATIENCE = 1.0
"""Seconds: whether a folder is in use is found out by locking it for a moment."""


class RunFolder:
    """The folder of one run, ``<save_dir>/<name>/<version>``, as :class:`RecordLogger` lays it out.

    Args:
        path: of the folder; made when the run begins.

    Raises:
        ConfigurationError: if it names less than a folder in a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if len(self.path.parts) < 2 or self.path.name in ("", ".."):
            raise ConfigurationError(f"--run {path}: give a folder in a folder, such as runs/my-study/bn-seed0.")
        self._lock = FileLock(self.path / _LOCK)

    @property
    def begun(self) -> bool:
        """Whether there is a record."""
        return (self.path / RECORD_NAME).is_file()

    @property
    def finished(self) -> bool:
        """Whether the run went to its end, tests and all."""
        return self.ending is not None

    @property
    def ending(self) -> dict[str, Any] | None:
        """What the run said of itself at its end; None before, or where the file is damaged."""
        try:
            return parsed((self.path / f"{FINISHED_NAME}.json").read_bytes())
        except (OSError, ValueError):
            return None

    @property
    def divergence(self) -> str:
        """From when on its losses were not finite, in words; empty where they were."""
        match self.ending:
            case {"not_finite": {"key": str(key), "step": int(step)}}:
                return str(NotFinite(key, step))
            case _:
                return ""

    @property
    def checkpoint(self) -> str | None:
        """The newest whole checkpoint, which an interrupted run goes on from.

        Those for going on only come first: others may be from before all was logged at the end of an epoch. That is
        also why there is none while the first of them is waited for.
        """
        folder = self.path / "checkpoints"
        own = sorted(folder.glob(f"{NEWEST}*.ckpt"), key=_age)
        if not own and any(folder.glob(f"{NEWEST}*{_WAITING}")):
            return None
        others = sorted(set(folder.glob("*.ckpt")).difference(own), key=_age)
        return next((str(path) for path in (*own, *others) if _is_whole(path)), None)

    @property
    def wandb_id(self) -> str | None:
        """W&B's name of the run, so that what comes later joins it."""
        try:
            found = read_record(self.path).settings.get("wandb") if self.begun else None
        except ConfigurationError:  # a record that cannot be read is no reason not to go on
            return None
        name = found.get("id") if isinstance(found, Mapping) else None
        return name if isinstance(name, str) else None

    def direct(self, loggers: Sequence[tuple[str, Any]]) -> None:
        """Change the settings of the loggers about to be built so that the run is written here.

        Args:
            loggers: class names and settings.

        Raises:
            ConfigurationError: if the first logger, which checkpoints are beside, is not a RecordLogger.
        """
        if not loggers or loggers[0][0] != "RecordLogger":
            raise ConfigurationError(f"--run {self.path} needs a RecordLogger as the first of trainer.logger.")
        study = self.path.parent
        for kind, settings in loggers:
            if kind == "RecordLogger":
                settings["save_dir"], settings["name"] = str(study.parent), study.name
                settings["version"] = self.path.name
            elif kind == "WandbLogger":
                settings["name"], settings["id"] = self.path.name, self.wandb_id

    def claim(self) -> None:
        """Keep other processes from writing here until this one ends; on rank zero.

        Raises:
            ConfigurationError: if another one is writing, or the folder cannot be written.
        """
        if not is_rank_zero():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=_PATIENCE)
        except Timeout as error:
            raise ConfigurationError(
                f"--run {self.path} is being written by another process. Wait for it, or choose another folder."
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"--run {self.path}: cannot write there ({error.strerror}). Choose another folder."
            ) from error

    def release(self) -> None:
        """Let others write."""
        self._lock.release()

    @property
    def in_use(self) -> bool:
        """Whether some process is writing here."""
        if not (self.path / _LOCK).is_file():
            return False
        try:
            with FileLock(self.path / _LOCK, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # somebody else's, who is not writing as far as can be told
            return False

    def finish(self, logger: Any, seconds: float) -> None:
        """Write down that the run went to its end, and how; leave one of the checkpoints for going on."""
        ending = {"status": "finished", "seconds": round(seconds, 1)}
        if is_rank_zero():
            folder = self.path / "checkpoints"
            old = sorted(folder.glob(f"{NEWEST}*.ckpt"), key=_age)[1:]
            for path in [*old, *folder.glob(f"{NEWEST}*{_WAITING}")]:
                remove_checkpoint(path)
            with suppress(ConfigurationError):  # a record that could not be written at all
                found = read_record(self.path).diverged
                ending |= {"status": DIVERGED, "not_finite": found._asdict()} if found else {}
        logger.log_results(FINISHED_NAME, ending)
        logger.finalize("success")


def waiting(checkpoint: str) -> str:
    """Where a checkpoint for going on is until it is one to go on from."""
    return f"{checkpoint}{_WAITING}"


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, of one file or many, as far as that is possible."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:  # just replaced
        return 0.0


def _is_whole(path: Path) -> bool:
    """Whether training can go on from a checkpoint: it was written to its end, and not of the weights alone."""
    if path.is_dir():  # one file for each rank; Lightning writes this one last
        return (path / "meta.pt").is_file()
    try:
        with zipfile.ZipFile(path) as archive:
            (index,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return b"optimizer_states" in archive.read(index)
    except Exception:  # a dozen kinds, for as many ways in which an archive can be damaged
        return False
