"""A run with a folder of its own choice: who writes it, how far it is, and where it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_normgeo.errors import ConfigurationError, is_rank_zero
from lightning_normgeo.record import RECORD_NAME, read_record

_FINISHED, _LOCK, _LAST = "run", ".lock", "checkpoints/last.ckpt"


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
    def logger_settings(self) -> dict[str, str]:
        """The arguments of the RecordLogger that writes here."""
        return {
            "save_dir": str(self.path.parent.parent),
            "name": self.path.parent.name,
            "version": self.path.name,
        }

    @property
    def begun(self) -> bool:
        """Whether there is a record."""
        return (self.path / RECORD_NAME).is_file()

    @property
    def finished(self) -> bool:
        """Whether the run went to its end, tests and all."""
        return (self.path / f"{_FINISHED}.json").is_file()

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that an interrupted run goes on from."""
        return str(self.path / _LAST) if (self.path / _LAST).is_file() else None

    @property
    def wandb_id(self) -> str | None:
        """W&B's name of the run, so that what comes later joins it."""
        found = read_record(self.path).settings.get("wandb", {}) if self.begun else {}
        return found.get("id")

    def claim(self) -> None:
        """Keep other processes from writing here until this one ends; on rank zero.

        Raises:
            ConfigurationError: if another one is writing, or the folder cannot be written.
        """
        if not is_rank_zero():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
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
        if not self.path.is_dir():
            return False
        try:
            with self._lock.acquire(timeout=0):
                return False
        except Timeout:
            return True

    def finish(self, logger: Any, seconds: float) -> None:
        """Write down that the run went to its end."""
        logger.log_results(_FINISHED, {"status": "finished", "seconds": round(seconds, 1)})
