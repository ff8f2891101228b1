"""Filters for messages of Lightning and other libraries that do not help a user of the command line."""

from __future__ import annotations

import logging
import re
import warnings

_LOGGERS = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric", "lightning")
_MESSAGES = re.compile(
    r"^\W*("
    r"Tip:|Seed set to|GPU available|TPU available|HPU available|IPU available|MPS available|Using (16|bf16|default)"
    r"|Restoring states from|Restored all states|Loaded model weights|`Trainer\.fit` stopped: `max_epochs"
    r"|`Trainer\(limit_\w+=.*\)` was configured"
    r"|`weights_only` was not set|Detected KeyboardInterrupt|\[?rank: \d+\]? Seed set|.*Received SIGTERM"
    r")"
)
_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*is deprecated",  # Lightning on the newest torch
    r"(?s)\s*By default only one JsonargparseDeprecationWarning",  # LightningCLI on the newest jsonargparse
    r"\s*``ArgumentParser.add_instantiator`` was deprecated",
    r"The '.*dataloader' does not have many workers",  # the number of workers is set in the configuration
    r"The number of training batches .* is smaller than the logging interval",
    r"The dirpath has changed from",  # a run that is resumed elsewhere
    r"Checkpoint directory .* exists and is not empty",  # a run that is resumed
    r"LightningCLI's args parameter is intended to run from within Python",  # normgeo changes names into paths
)


def keep_quiet() -> None:
    """Hide Lightning's tips and status lines and known library warnings; errors and this package's warnings stay."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or _MESSAGES.match(record.getMessage()) is None
