"""Reports made from the records of runs; writing one needs the packages of the extra ``report``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_normgeo.report.write import REPORT_NAME as REPORT_NAME
    from lightning_normgeo.report.write import write_report as write_report


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the package can be imported without the extra ``report``."""
    if name not in ("REPORT_NAME", "write_report"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_normgeo.report import write

    return getattr(write, name)
