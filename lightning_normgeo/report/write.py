"""Where reports go, and in which format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import ConfigurationError, closest
from lightning_normgeo.files import replacing
from lightning_normgeo.record import RECORD_NAME, STUDY_NAME
from lightning_normgeo.report.figures import all_figures
from lightning_normgeo.report.page import render
from lightning_normgeo.report.runs import Run, load_runs
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.text import as_csv, as_latex, as_markdown

REPORT_NAME = "report.html"
FORMATS = ("html", "md", "tex", "csv", "png", "pdf")
_PIXELS_PER_POINT = 2.0


def write_report(
    runs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    form: str = "html",
    layers: Sequence[str] = (),
    title: str | None = None,
) -> Path:
    """Write a report of some runs and return its path.

    Args:
        runs: a run, a study, or several; see :func:`load_runs`.
        output: the file; for ``png`` and ``pdf`` a folder, which gets one file for each figure. If left out: ``report``
            with the format's ending in the folder of the only run or study, else in the current one.
        form: ``html``, one page that opens without a network; ``md``, ``tex`` or ``csv``, its tables; ``png`` or
            ``pdf``, its figures.
        layers: globs of the layers that figures can show; the first residual block and a few others if left out.
        title: of the report; the runs' folder if left out.

    Raises:
        ConfigurationError: if there is no run, one has no record, or the format or folder cannot be written.
    """
    if form not in FORMATS:
        raise ConfigurationError(f"--format {form} is unknown; choose one of {closest(form, FORMATS, len(FORMATS))}.")
    sources = [runs] if isinstance(runs, (str, Path)) else list(runs)
    loaded = load_runs(sources)
    path = Path(output) if output is not None else _place(sources, form)
    title = title or _title(sources)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form in ("png", "pdf"):
            _write_figures(path, all_figures(loaded, layers), form)
        else:
            text = _text(loaded, form, title, layers)
            with replacing(path) as draft:
                draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--output {path}: cannot write there ({error.strerror}).") from error
    return path


def _text(runs: list[Run], form: str, title: str, layers: Sequence[str]) -> str:
    if form == "html":
        return render(runs, title, layers)
    if form == "csv":
        return as_csv(runs)
    return (as_markdown if form == "md" else as_latex)(title, all_tables(runs))


def _write_figures(folder: Path, figures: Sequence[Any], form: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        figure.chart.save(folder / f"{figure.anchor}.{form}", scale_factor=_PIXELS_PER_POINT if form == "png" else 1.0)


def _place(sources: Sequence[str | Path], form: str) -> Path:
    only = _folder(sources[0])
    folder = only if len(sources) == 1 and only.is_dir() else Path()
    return folder / ("figures" if form in ("png", "pdf") else f"report.{form}")


def _title(sources: Sequence[str | Path]) -> str:
    if len(sources) > 1:
        return f"{len(sources)} sources"
    folder = _folder(sources[0])
    if not folder.exists():  # of W&B
        return str(sources[0])
    parts = folder.absolute().parts
    return parts[-1] if (folder / STUDY_NAME).is_file() else " / ".join(parts[-2:])


def _folder(source: str | Path) -> Path:
    """Return the folder of a run or study that may be given by its file."""
    path = Path(source)
    return path.parent if path.name in (RECORD_NAME, STUDY_NAME) else path
