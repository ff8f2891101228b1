"""The command ``normgeo report``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.utilities.one_line_parser import OneLineArgumentParser
from lightning_normgeo.utilities.plain_text import plain_line

_DESCRIPTION = """Write a report of runs: one HTML page that opens without a network, tables for papers, pictures, or a
report of W&B. Several runs are compared: a panel for each normalization, a color for what else differs."""
_EXTRA = "pip install 'lightning-normgeo[report]'"


def report_parser() -> OneLineArgumentParser:
    """Return the parser of ``normgeo report``."""
    parser = OneLineArgumentParser(prog="normgeo report", description=_DESCRIPTION)
    parser.add_argument(
        "runs",
        type=str,
        nargs="+",
        help="Folders of runs or studies, or entity/project of W&B or the address of its page.",
    )
    parser.add_argument("--format", type=str, default="html", help="html, md, tex, csv, png or pdf.")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="File to write; a folder for png and pdf. Default: beside the runs.",
    )
    parser.add_argument(
        "--title", type=str | None, default=None, help="Title of the report. Default: the folder's name."
    )
    parser.add_argument(
        "--layers",
        type=list[str],
        default=[],
        help="Globs of the layers that figures can show, such as '[\"*conv1\"]'.",
    )
    parser.add_class_arguments(
        Thresholds, "thresholds", help="Limits by which verdicts on the paper's claims are given."
    )
    parser.add_argument(
        "--wandb", type=str | None, default=None, help="Publish the report in entity/project of W&B instead."
    )
    return parser


def main(args: list[str]) -> int:
    """Run ``normgeo report`` and return its exit status, which is 0.

    Args:
        args: Arguments after ``normgeo report``.

    Raises:
        ConfigurationError: If the report cannot be written or published.
    """
    parser = report_parser()
    options = parser.instantiate(parser.parse_args(args))
    if options.wandb is not None:
        for url in _publish(options):
            print(url)
        return 0
    try:
        from lightning_normgeo.report.write import write_report
    except ImportError as error:
        raise ConfigurationError(f"normgeo report needs {error.name}: {_EXTRA}") from error
    written = write_report(
        options.runs, options.output, options.format, options.layers, options.title, options.thresholds
    )
    print(written.absolute())
    return 0


def write_quietly(runs: Sequence[str | Path]) -> str:
    """Write the HTML page of some runs without raising an error.

    Args:
        runs: Sources of runs; see :func:`load_runs`.

    Returns:
        The path of the page, or "not written" with the reason.
    """
    try:
        from lightning_normgeo.report.write import write_report
    except ImportError as error:
        return f"not written, {error.name} is missing: {_EXTRA}"
    try:
        return str(write_report(runs).absolute())
    except Exception as error:  # a study of many hours must not end with a traceback of its report
        return f"not written: {plain_line(error)}"


def _publish(options: Namespace) -> Sequence[str]:
    """Publish a report at W&B, and return the addresses of the report and the workspace view."""
    match = re.fullmatch(r"([\w.-]+)/([\w.-]+)", options.wandb)
    if match is None:
        raise ConfigurationError(f"--wandb {options.wandb} is not entity/project.")
    from lightning_normgeo.report.compared_runs import load_runs
    from lightning_normgeo.report.tables import all_tables
    from lightning_normgeo.report.verdicts.study_verdicts import verdicts_of
    from lightning_normgeo.report.wandb.publishing import publish_report

    runs = load_runs(options.runs)
    tables = all_tables(runs, verdicts_of(runs, options.thresholds))
    return publish_report(runs, match[1], match[2], tables, options.title or match[2])
