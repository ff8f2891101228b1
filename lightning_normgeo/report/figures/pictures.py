"""Pictures of runs, inside the page: PNG and JPEG files of the run's own folder, and nothing else."""

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
_MOST, _MOST_PIXELS = 8 * MEBIBYTE, 40_000_000
"""Bytes of a file and pixels that it may unpack to; a strip of attacked images has about a thousandth of either."""
_BEGINNINGS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}


@dataclass(frozen=True)
class Picture:
    """One picture of the page.

    Attributes:
        uri: what the page shows; empty for a picture that is left out.
        caption: what is seen on it.
        problem: why it is left out.
    """

    uri: str
    caption: str
    problem: str = ""


def pictures_of(runs: Sequence[Run]) -> list[Picture]:
    """Return a few of the example images of every run."""
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
    """Return a picture of a run's folder as an address that holds it.

    Raises:
        ConfigurationError: if it is elsewhere, no PNG or JPEG, or too large; see :func:`contained_file`.
    """
    content = read_contained(folder, name, _MOST)
    form = next((form for form, beginning in _BEGINNINGS.items() if content.startswith(beginning)), None)
    try:
        if form is None:
            raise OSError
        with warnings.catch_warnings(action="error"), Image.open(io.BytesIO(content), formats=(form,)) as image:
            width, height = image.size
            image.verify()
    except Exception as error:  # whatever PIL makes of a broken file
        raise ConfigurationError(f"{name} is no PNG or JPEG picture") from error
    if width * height > _MOST_PIXELS:
        raise ConfigurationError(f"{name} has {width}×{height} pixels, more than {_MOST_PIXELS:,}")
    return f"data:image/{form.lower()};base64,{base64.b64encode(content).decode()}"
