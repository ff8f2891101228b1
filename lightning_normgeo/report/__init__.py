"""Reports made from the records of runs; writing one needs the packages of the extra ``report``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_normgeo.report.verdicts.study_verdicts import study_verdicts as study_verdicts
    from lightning_normgeo.report.write import REPORT_NAME as REPORT_NAME
    from lightning_normgeo.report.write import write_report as write_report


_HOMES = {"REPORT_NAME": "write", "study_verdicts": "verdicts.study_verdicts", "write_report": "write"}
"""The module of each public name, relative to this one."""


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the package can be imported without the extra ``report``."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
