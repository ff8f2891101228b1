"""A logger whose service fails, for use on command lines."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.loggers import CSVLogger


class Broken(CSVLogger):
    """A logger that raises as if its service were down."""

    calls = 0

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        type(self).calls += 1
        raise ConnectionError("service\nis gone")
