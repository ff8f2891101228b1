"""A study as a sweep of W&B, so that many machines can share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.study.definition import Study

_METRIC = {"name": "val/accuracy", "goal": "maximize"}


def sweep_of(study: Study) -> dict[str, Any]:
    """Return the configuration of a W&B grid sweep that runs what the study runs.

    Raises:
        ConfigurationError: for a value that W&B cannot hand on.
    """
    for option, values in study.grid.items():
        if None in values:
            raise ConfigurationError(
                f"grid.{option} has the value null, which wandb agent hands on as the text 'None'. Leave it out, or "
                "put it into a file and give that as a value of the option config."
            )
    # python is named by its module, so that it is the agent's own environment that runs
    command = ["${env}", "${interpreter}", "-m", "lightning_normgeo", "fit", "--wandb=online", *study.shared, "${args}"]
    return {
        "name": study.name,
        "description": "Written by normgeo study --wandb-sweep; run it with wandb sweep and wandb agent.",
        "method": "grid",
        "metric": _METRIC,
        "parameters": {option: {"values": values} for option, values in study.grid.items()},
        "command": command,
    }


def write_sweep(study: Study, path: str | Path) -> Path:
    """Write :func:`sweep_of` as YAML."""
    path = Path(path)
    try:
        path.write_text(yaml.safe_dump(sweep_of(study), sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--wandb-sweep {path}: cannot write there ({error.strerror}).") from error
    return path
