"""Columns of numbers read safely from an ``.npz`` file of unknown origin."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_FREE, _FACTOR = 2**28, 64
"""Limit of the unpacked size: ``_FREE`` bytes plus ``_FACTOR`` bytes for each byte of the file.

Per-sample results are packed to between a half and a twentieth. A file that unpacks to a thousandfold is an attempt to
fill the memory."""
_LONGEST_HEADER = 10_000
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_columns(path: str | Path) -> Mapping[str, np.ndarray[Any, Any]]:
    """Return the one-dimensional arrays of integers, real numbers or booleans in a file, by name.

    No pickle is read. Before memory is allocated, the size that a header declares has to be the size in the archive, so
    that the cost is bounded by the size of the file.

    Args:
        path: an ``.npz`` file.

    Raises:
        ValueError: for arrays of another kind, and for a file that unpacks to far more than its size.
        OSError: for a file that does not exist or cannot be read.
        EOFError, zipfile.BadZipFile, zlib.error: for a broken file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no ordinary file")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size, most = sum(member.file_size for member in members), _FREE + _FACTOR * path.stat().st_size
        if size > most:
            raise ValueError(f"it unpacks to {size} bytes, more than {most}")
        if any(member.flag_bits & 1 or member.compress_type not in _METHODS for member in members):
            raise ValueError("it is encrypted, or packed by another method than numpy's")
        return {member.filename.removesuffix(".npy"): _read(archive, member) for member in members}


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    import numpy as np

    with archive.open(member) as file:
        try:
            shape, dtype = _header(file)
        except Exception as error:  # numpy parses the header as a Python literal, which may raise any error
            raise ValueError(f"{member.filename} has no header of numpy's") from error
        if len(shape) != 1 or dtype.kind not in "biuf":
            raise ValueError(f"{member.filename} has shape {shape} and type {dtype}; columns of numbers are expected")
        if prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename} declares {prod(shape)} values of {dtype}, and holds another number")
        return np.frombuffer(bytearray(file.read()), dtype)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and dtype that an array's header declares."""
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise ValueError(f"a format of version {version}")
    shape, _, dtype = readers[version](file, max_header_size=_LONGEST_HEADER)
    return shape, dtype
