"""Files of folders that somebody else may have written: only ordinary ones, of bounded size, and none elsewhere.

A run's folder may come from anybody, by mail or from a shared disk. Whatever its record names, and wherever its links
lead, its readers open nothing outside of it. That a name stays inside is decided here, once its links are followed.
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
        folder: which may itself be a link: whoever runs the command has chosen it.
        name: relative to the folder, from whatever source.
        most: the largest size, in bytes.

    Raises:
        ConfigurationError: if the name is none, leads out of the folder by ``..``, as an absolute path or through a
            link, or if the file is missing, too large, a folder, device, pipe or socket. The message begins with the
            name and fits into a sentence.
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

    Raises:
        ConfigurationError: like :func:`contained_file`.
    """
    path = _inside(folder, name)
    if not path.is_dir():
        raise ConfigurationError(f"{name} is no folder")
    return path


def read_contained(folder: str | Path, name: object, most: int) -> bytes:
    """Return the content of an ordinary file within a folder.

    Raises:
        ConfigurationError: like :func:`contained_file`, or if the file cannot be read.
    """
    path = contained_file(folder, name, most)
    try:
        with open(path, "rb", opener=_patiently) as file:  # a Path has no opener
            content: bytes = file.read(most + 1)
    except OSError as error:
        raise ConfigurationError(f"{name} cannot be read ({error.strerror})") from error
    if len(content) > most:  # it has grown
        raise ConfigurationError(f"{name} is larger than {most / MEBIBYTE:.4g} MiB")
    return content


def leads_out(path: Path) -> bool:
    """Whether something by this name is there, and is not in the folder that the path says: a link leads elsewhere."""
    try:
        return path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return True


def _inside(folder: str | Path, name: object) -> Path:
    if not isinstance(name, str | os.PathLike):
        raise ConfigurationError(f"{name!r} is no name of a file")
    path = Path(folder, name)
    try:
        inside = path.resolve(strict=True).is_relative_to(Path(folder).resolve())
    except FileNotFoundError as error:
        raise ConfigurationError(f"{name} does not exist") from error
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL within, a loop of links, no permission
        raise ConfigurationError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not inside:
        raise ConfigurationError(f"{name} leads out of the folder")
    return path


def _patiently(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe that has taken the file's place."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
