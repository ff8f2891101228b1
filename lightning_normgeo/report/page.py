"""From a run's record to one self-contained HTML page."""

from __future__ import annotations

import base64
from pathlib import Path

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_normgeo._version import __version__
from lightning_normgeo.record import Record, read_record
from lightning_normgeo.report.figures import all_figures
from lightning_normgeo.report.runs import flat

REPORT_NAME = "report.html"


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    The page holds its scripts, data and pictures: it opens without a network, from a file, anywhere.

    Args:
        run: the run's folder.

    Raises:
        ConfigurationError: if there is no record in it.
    """
    record = read_record(run)
    path = record.folder / REPORT_NAME
    path.write_text(render(record), encoding="utf-8")
    return path


def render(record: Record) -> str:
    """Return the page of a record."""
    environment = Environment(
        loader=PackageLoader("lightning_normgeo.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = all_figures(record)
    robustness = record.results.get("robustness")
    return environment.get_template("page.html.j2").render(
        title=" / ".join(record.folder.parts[-2:]),
        figures=figures,
        specs={figure.anchor: _inline_json(figure.chart.to_json(indent=None)) for figure in figures},
        library=_library(),
        results=robustness["results"] if robustness else [],
        warnings=robustness.get("warnings", []) if robustness else [],
        threat=flat(robustness["settings"]) if robustness else {},
        images=[
            (_data_uri(record.folder / file), caption) for file, caption in record.images.get("robustness/examples", [])
        ],
        settings=flat(record.settings.get("config", record.settings)),
        steps=_last_step(record) + 1,
        complete=record.complete,
        version=__version__,
    )


def _last_step(record: Record) -> int:
    """Return the last training step; what the test loop logs has a step of its own."""
    tested = ("test/", "robustness/", "epoch")
    return max(
        (s for key, points in record.metrics.items() if not key.startswith(tested) for s, _ in points), default=-1
    )


def _library() -> str:
    """Return the drawing library, safe inside a script element."""
    bundle: str = vl_convert.javascript_bundle(vl_version=alt.SCHEMA_VERSION.rpartition(".")[0])  # type: ignore[call-arg]
    # only the end of a script has to be hidden: "</" alone also occurs in regular expressions
    return bundle.replace("</script", "<\\/script")


def _inline_json(text: str) -> str:
    """Make JSON safe inside a script element."""
    return text.replace("</", "<\\/")


def _data_uri(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode() if file.is_file() else ""
