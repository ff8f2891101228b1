"""Folders of runs: whether they can be written, and names that no other run has."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from lightning_normgeo.errors import ConfigurationError, is_rank_zero

_LONGEST_NAME = 255
"""Bytes of the longest name of a folder."""


def check_writable(save_dir: str, name: str) -> None:
    """Check on rank zero that runs can be written to ``save_dir/name``, which is created if needed.

    Raises:
        ConfigurationError: If they cannot; the message names the folder and the reason.
    """
    if not is_rank_zero():
        return
    folder = Path(save_dir) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"RecordLogger(save_dir={save_dir!r}): cannot write there ({error.strerror}). Choose another folder."
        ) from error


def claim_version(folder: Path) -> str:
    """Create a run folder named after the current time that no other run has, and return its name; on rank zero."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for version in [stamp, *(f"{stamp}-{i}" for i in range(1, 1000))]:
        if not is_rank_zero():  # other ranks need a name, but write nothing
            return version
        try:
            (folder / version).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # a full disk: the first line for which there is room creates it
            return version
        return version
    raise ConfigurationError(f"{folder} has a thousand runs that started at {stamp}; give version=… a name.")


class SharedName:
    """A name that this process and all that are forked from it know as soon as one of them has set it.

    Strategies such as ``ddp_fork``, Lightning's default in notebooks, train in a child process. The name of the run is
    claimed there, and read afterwards in the process of the user.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _LONGEST_NAME + 1)

    @property
    def value(self) -> str | None:
        """The name; None before it is set."""
        return self._memory[:].rstrip(b"\0").decode() or None

    @value.setter
    def value(self, name: str) -> None:
        self._memory[: len(name.encode())] = name.encode()
