"""Example images of runs, embedded in the page: only PNG and JPEG files of the run's own folder."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.utilities.contained_files import MEBIBYTE, read_contained

_PICTURES = 8
"""Pictures of all runs together, and at least one of each run."""
_MOST, _MOST_PIXELS = 8 * MEBIBYTE, 40_000_000
"""Largest size of a file in bytes, and of its picture in pixels; example images have about a thousandth of either."""
_BEGINNINGS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}


@dataclass(frozen=True)
class Picture:
    """One picture of the page.

    Attributes:
        uri: Data URI with the picture; empty if it is left out.
        caption: Caption of the picture.
        problem: Reason for which the picture is left out; empty if it is shown.
    """

    uri: str
    caption: str
    problem: str = ""


def pictures_of(runs: Sequence[Run]) -> list[Picture]:
    """Return the first few example images of each run."""
    each = max(1, _PICTURES // max(1, len(runs)))
    found = []
    for run in runs:
        for file, caption in run.record.examples[:each]:
            text = f"{run.name}: {caption}" if len(runs) > 1 else caption
            try:
                found.append(Picture(data_uri(run.record.folder, file), text))
            except ConfigurationError as error:
                found.append(Picture("", text, f"Picture left out: {error}."))
    return found


def data_uri(folder: Path, name: object) -> str:
    """Return a picture in a run's folder as a data URI.

    Args:
        folder: Folder of the run.
        name: Path of the file within the folder, as read from the record.

    Raises:
        ConfigurationError: If the file is outside the folder (see :func:`contained_file`), is not a PNG or JPEG
            picture, or is too large.
    """
    content = read_contained(folder, name, _MOST)
    form = next((form for form, beginning in _BEGINNINGS.items() if content.startswith(beginning)), None)
    try:
        if form is None:
            raise OSError
        with warnings.catch_warnings(action="error"), Image.open(io.BytesIO(content), formats=(form,)) as image:
            width, height = image.size
            image.verify()
    except Exception as error:  # PIL raises many kinds of errors for a broken file
        raise ConfigurationError(f"{name} is no PNG or JPEG picture") from error
    if width * height > _MOST_PIXELS:
        raise ConfigurationError(f"{name} has {width}×{height} pixels, more than {_MOST_PIXELS:,}")
    return f"data:image/{form.lower()};base64,{base64.b64encode(content).decode()}"
