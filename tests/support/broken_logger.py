"""A logger that fails, named on command lines."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.loggers import CSVLogger


class Broken(CSVLogger):
    """A logger whose service is gone."""

    calls = 0

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        type(self).calls += 1
        raise ConnectionError("service\nis gone")
