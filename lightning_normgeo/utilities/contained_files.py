"""Safe reading from folders that somebody else may have written: ordinary files of bounded size within the folder.

A run's folder may come from anybody, by mail or from a shared disk. Whatever paths its record names and wherever its
links point, nothing outside of it is opened. Whether a path stays inside is checked after its links are resolved.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lightning_normgeo.errors import ConfigurationError

MEBIBYTE = 2**20


def contained_file(folder: str | Path, name: object, most: int) -> Path:
    """Return the path of an ordinary file within a folder.

    Args:
        folder: trusted path of the folder, given by the user; it may itself be a link.
        name: untrusted path relative to the folder.
        most: the largest allowed size, in bytes.

    Raises:
        ConfigurationError: if ``name`` is not a path, leads out of the folder by ``..``, as an absolute path or through
            a link, or if the file is missing, too large, a folder, device, pipe or socket. The message begins with the
            name and has no period, so that callers can make it part of a sentence.
    """
    path = _inside(folder, name)
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ConfigurationError(f"{name} is no ordinary file")
    if found.st_size > most:
        raise ConfigurationError(f"{name} is larger than {most / MEBIBYTE:.4g} MiB")
    return path


def contained_folder(folder: str | Path, name: object) -> Path:
    """Return the path of a folder within a folder.

    Args:
        folder: trusted path of the outer folder.
        name: untrusted path relative to it.

    Raises:
        ConfigurationError: like :func:`contained_file`.
    """
    path = _inside(folder, name)
    if not path.is_dir():
        raise ConfigurationError(f"{name} is no folder")
    return path


def read_contained(folder: str | Path, name: object, most: int) -> bytes:
    """Return the content of an ordinary file within a folder.

    Args:
        folder: trusted path of the folder.
        name: untrusted path relative to it.
        most: the largest allowed size, in bytes.

    Raises:
        ConfigurationError: like :func:`contained_file`, or if the file cannot be read.
    """
    path = contained_file(folder, name, most)
    try:
        with open(path, "rb", opener=_open_without_blocking) as file:  # Path.open takes no opener
            content: bytes = file.read(most + 1)
    except OSError as error:
        raise ConfigurationError(f"{name} cannot be read ({error.strerror})") from error
    if len(content) > most:  # it has grown since its size was checked
        raise ConfigurationError(f"{name} is larger than {most / MEBIBYTE:.4g} MiB")
    return content


def leads_out(path: Path) -> bool:
    """Whether a path is a link to a place outside of its own folder."""
    try:
        return path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return True


def _inside(folder: str | Path, name: object) -> Path:
    if not isinstance(name, str | os.PathLike):
        raise ConfigurationError(f"{name!r} is no name of a file")
    path = Path(folder, name)
    try:
        inside = path.resolve(strict=True).is_relative_to(Path(folder).resolve())
    except FileNotFoundError as error:
        raise ConfigurationError(f"{name} does not exist") from error
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, links in a circle, no permission
        raise ConfigurationError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not inside:
        raise ConfigurationError(f"{name} leads out of the folder")
    return path


def _open_without_blocking(path: str, flags: int) -> int:
    """Open a file without blocking, in case a pipe has taken its place since it was checked."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
