"""The folder of a run: its lock, its state, and the checkpoint from which it resumes."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_normgeo.errors import ConfigurationError, is_rank_zero
from lightning_normgeo.runs.records.record import FINISHED_NAME, RECORD_NAME, NotFinite
from lightning_normgeo.runs.records.record_reader import read_record
from lightning_normgeo.utilities.files import parsed, user_path

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in the folder of a run, as Lightning gives it."""
NEWEST = "resume-"
"""Prefix of the names of checkpoints that serve only to resume a run."""
DIVERGED = "diverged"
"""The status of a run that reached its end with losses that are not finite; otherwise it is ``finished``."""
_WAITING = ".next"
"""Ending of the temporary name of a checkpoint that is not yet the one to resume from."""
_LOCK = ".lock"
_PATIENCE = 1.0
"""Seconds to wait for the lock: :attr:`RunFolder.in_use` of another process takes it for a moment."""


class RunFolder:
    """The folder of one run, ``<save_dir>/<name>/<version>``, as :class:`RecordLogger` lays it out.

    Args:
        path: Path of the folder, which is created when the run begins.

    Raises:
        ConfigurationError: If the path is not a folder within a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        if len(self.path.parts) < 2 or self.path.name in ("", ".."):
            raise ConfigurationError(f"--run {path}: give a folder in a folder, such as runs/my-study/bn-seed0.")
        self._lock = FileLock(self.path / _LOCK)

    @property
    def begun(self) -> bool:
        """Whether the run has a record."""
        return (self.path / RECORD_NAME).is_file()

    @property
    def finished(self) -> bool:
        """Whether the run reached its end, including its tests."""
        return self.ending is not None

    @property
    def ending(self) -> dict[str, Any] | None:
        """The results that the run wrote at its end; None before that, or if their file is damaged."""
        try:
            return parsed((self.path / f"{FINISHED_NAME}.json").read_bytes())
        except (OSError, ValueError):
            return None

    @property
    def divergence(self) -> str:
        """In words, the step from which the losses were not finite; empty for other runs and before the end."""
        match self.ending:
            case {"not_finite": {"key": str(key), "step": int(step)}}:
                return str(NotFinite(key, step))
            case _:
                return ""

    @property
    def checkpoint(self) -> str | None:
        """The newest complete checkpoint, from which an interrupted run resumes; None if there is none.

        Checkpoints that serve only to resume a run take precedence: others may have been written before everything was
        logged at the end of an epoch. For the same reason it is None until the first of them is complete.
        """
        folder = self.path / CHECKPOINTS
        own = sorted(folder.glob(f"{NEWEST}*.ckpt"), key=_age)
        if not own and any(folder.glob(f"{NEWEST}*{_WAITING}")):
            return None
        others = sorted(set(folder.glob("*.ckpt")).difference(own), key=_age)
        return next((str(path) for path in (*own, *others) if _is_whole(path)), None)

    @property
    def wandb_id(self) -> str | None:
        """W&B's id of the run, so that a resumed run continues it; None if unknown."""
        try:
            found = read_record(self.path).settings.get("wandb") if self.begun else None
        except ConfigurationError:  # a damaged record must not prevent resuming
            return None
        name = found.get("id") if isinstance(found, Mapping) else None
        return name if isinstance(name, str) else None

    def direct(self, loggers: Sequence[tuple[str, Any]]) -> None:
        """Change the settings of loggers that are not built yet so that the run is written into this folder.

        Args:
            loggers: Class name and settings of each logger.

        Raises:
            ConfigurationError: If the first logger, into whose folder Lightning writes checkpoints, is no RecordLogger.
        """
        if not loggers or loggers[0][0] != "RecordLogger":
            raise ConfigurationError(f"--run {self.path} needs a RecordLogger as the first of trainer.logger.")
        study = self.path.parent
        for kind, settings in loggers:
            if kind == "RecordLogger":
                settings["save_dir"] = str(study.parent)
                settings["name"] = study.name
                settings["version"] = self.path.name
            elif kind == "WandbLogger":
                settings["name"] = self.path.name
                settings["id"] = self.wandb_id

    def claim(self) -> None:
        """Create and lock the folder on rank zero, so that no other process writes into it until this one ends.

        Raises:
            ConfigurationError: If another process is writing into the folder, or it cannot be written.
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
        """Release the lock."""
        self._lock.release()

    @property
    def in_use(self) -> bool:
        """Whether a process is writing into the folder."""
        if not (self.path / _LOCK).is_file():
            return False
        try:
            with FileLock(self.path / _LOCK, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # the lock file belongs to another user: assume that nobody is writing
            return False

    def finish(self, logger: Any, seconds: float) -> None:
        """Record that the run reached its end and whether it diverged; keep only the newest checkpoint to resume from.

        Args:
            logger: The RecordLogger of the run.
            seconds: Duration of the run.
        """
        ending = {"status": "finished", "seconds": round(seconds, 1)}
        if is_rank_zero():
            folder = self.path / CHECKPOINTS
            old = sorted(folder.glob(f"{NEWEST}*.ckpt"), key=_age)[1:]
            for path in [*old, *folder.glob(f"{NEWEST}*{_WAITING}")]:
                remove_checkpoint(path)
            with suppress(ConfigurationError):  # a record that could not be written at all
                found = read_record(self.path).diverged
                if found is not None:
                    ending |= {"status": DIVERGED, "not_finite": found._asdict()}
        logger.log_results(FINISHED_NAME, ending)
        logger.finalize("success")


def waiting(checkpoint: str) -> str:
    """Return the temporary path of a checkpoint, which it has until it becomes the one to resume from."""
    return f"{checkpoint}{_WAITING}"


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, which is a file or a folder; errors of the file system are ignored."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Return the negative time of modification, so that sorting puts the newest file first."""
    try:
        return -path.stat().st_mtime
    except OSError:  # replaced in the meantime
        return 0.0


def _is_whole(path: Path) -> bool:
    """Whether training can resume from a checkpoint: it is complete, and not of the weights alone."""
    if path.is_dir():  # a sharded checkpoint with one file per rank; Lightning writes this file last
        return (path / "meta.pt").is_file()
    return holds_optimizer_states(path)


def holds_optimizer_states(path: Path) -> bool:
    """Whether a file is a complete checkpoint with optimizer states, found from its index without reading tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            (index,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return b"optimizer_states" in archive.read(index)
    except Exception:  # a damaged archive can raise a dozen kinds of errors
        return False
