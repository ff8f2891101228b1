"""Writing of reports in all formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import ConfigurationError, nearest_names
from lightning_normgeo.report.compared_runs import Run, load_runs
from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.report.figures.geometry_figures import all_figures
from lightning_normgeo.report.formats.html_page import render
from lightning_normgeo.report.formats.text import as_csv, as_latex, as_markdown
from lightning_normgeo.report.sources import AbsentRun, absent_runs, source_of
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.verdicts.study_verdicts import verdicts_of
from lightning_normgeo.runs.records.record import RECORD_NAME, STUDY_NAME
from lightning_normgeo.runs.run_title import run_title
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.utilities.contained_files import leads_out
from lightning_normgeo.utilities.files import replacing, user_path
from lightning_normgeo.utilities.plain_text import plain_line

REPORT_NAME = "report.html"
FORMATS = ("html", "md", "tex", "csv", "png", "pdf")
_PIXELS_PER_POINT = 2.0
"""Resolution of PNG pictures."""


def write_report(
    runs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    form: str = "html",
    layers: Sequence[str] = (),
    title: str | None = None,
    thresholds: Thresholds | None = None,
) -> Path:
    """Write a report of some runs.

    Args:
        runs: A run, a study, or several of them; see :func:`load_runs`.
        output: File to write; for ``png`` and ``pdf`` a folder, which gets one file for each figure. Default:
            ``report`` with the ending of the format, or the folder ``figures``, in the folder of the only run or study;
            with several sources in the current folder.
        form: ``html``, one page that opens without a network; ``md``, ``tex`` or ``csv``, its tables; ``png`` or
            ``pdf``, its figures.
        layers: Globs of the layers that figures can show. Default: the first residual block and a few others.
        title: Title of the report. Default: for one run its network, normalization, data and optimizer, else the folder
            of the runs.
        thresholds: Limits by which verdicts are given. Default: those that the documentation gives.

    Returns:
        The path of the file or folder.

    Raises:
        ConfigurationError: If there is no run, one has no record, the format is unknown, or the file cannot be written.
    """
    if form not in FORMATS:
        raise ConfigurationError(
            f"--format {form} is unknown; choose one of {nearest_names(form, FORMATS, len(FORMATS))}."
        )
    sources = [source_of(source) for source in ([runs] if isinstance(runs, (str, Path)) else runs)]
    loaded = load_runs(sources)
    absent = [one for source in sources for one in absent_runs(source, [run.record.folder for run in loaded])]
    path = user_path(output) if output is not None else _own(_place(sources, form))
    title = title or (run_title(loaded[0].record) if len(loaded) == 1 else "") or _title(sources)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form in ("png", "pdf"):
            _write_figures(path, all_figures(Curves(loaded, layers)), form, strict=output is None)
        else:
            text = _text(loaded, form, plain_line(title), layers, thresholds, absent)
            with replacing(path) as draft:
                draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--output {path}: cannot write there ({error.strerror}).") from error
    return path


def _text(
    runs: list[Run],
    form: str,
    title: str,
    layers: Sequence[str],
    thresholds: Thresholds | None,
    absent: Sequence[AbsentRun],
) -> str:
    if form == "html":
        return render(runs, title, layers, thresholds, absent)
    if form == "csv":
        return as_csv(runs)
    tables = all_tables(runs, verdicts_of(runs, thresholds), absent)
    return as_markdown(title, tables) if form == "md" else as_latex(title, tables)


def _write_figures(folder: Path, figures: Sequence[Any], form: str, strict: bool) -> None:
    """Write a file for each figure; ``strict`` refuses links out of a folder that the user did not name."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        path = folder / f"{figure.anchor}.{form}"
        figure.save(_own(path) if strict else path, _PIXELS_PER_POINT if form == "png" else 1.0)


def _own(path: Path) -> Path:
    """Return a path, unless it is a link by which someone else who wrote the folder would redirect the report."""
    draft = path.with_name(f"{path.name}.part")  # written first by :func:`replacing`
    if leads_out(path) or leads_out(draft):
        raise ConfigurationError(f"{path} is a link that leads out of its folder. Remove it, or give --output.")
    return path


def _place(sources: Sequence[str | Path], form: str) -> Path:
    """Return the default path of a report."""
    first = _folder(sources[0])
    folder = first if len(sources) == 1 and first.is_dir() else Path()
    return folder / ("figures" if form in ("png", "pdf") else f"report.{form}")


def _title(sources: Sequence[str | Path]) -> str:
    """Return the default title of a report."""
    if len(sources) > 1:
        return f"{len(sources)} sources"
    folder = _folder(sources[0])
    if not folder.exists():  # a project of W&B
        return str(sources[0])
    parts = folder.absolute().parts
    return " / ".join(parts[-2:]) if (folder / RECORD_NAME).is_file() else parts[-1]


def _folder(source: str | Path) -> Path:
    """Return the folder of a run or study that is given as a folder or as its file."""
    path = user_path(source)
    return path.parent if path.name in (RECORD_NAME, STUDY_NAME) else path
