"""A study as a sweep of W&B, so that many machines can share it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.study.definition import Study, files_first, text_of

_METRIC = {"name": "val/accuracy", "goal": "maximize"}


def sweep_of(study: Study, project: str | None = None) -> dict[str, Any]:
    """Return the configuration of a W&B grid sweep that runs what the study runs.

    Args:
        study: what is run.
        project: of W&B where the sweep will be; the one that ``wandb sweep`` is told if left out.

    Raises:
        ConfigurationError: for a value that W&B cannot hand on.
    """
    for option, values in study.grid.items():
        for value in _changed(values):
            raise ConfigurationError(
                f"grid.{option} has the value {text_of(value)}, which wandb agent hands on as the text '{value}'. "
                "Leave it out, or put it into a file and give that as a value of the option config."
            )
    # python is named by its module, so that it is the agent's own environment that runs
    command = ["${env}", "${interpreter}", "-m", "lightning_normgeo", "fit", *study.shared, "--wandb=online", "${args}"]
    return {
        **({"project": project} if project else {}),
        "name": study.name,
        "description": "Written by normgeo study --wandb-sweep; run it with wandb sweep and wandb agent.",
        "method": "grid",
        "metric": _METRIC,
        "parameters": {option: {"values": values} for option, values in files_first(study.grid).items()},
        "command": command,
    }


def write_sweep(study: Study, settings: Any, path: str | Path) -> Path:
    """Write :func:`sweep_of` as YAML, for the project that the runs' settings name."""
    path = Path(path)
    text = yaml.safe_dump(sweep_of(study, _project(settings)), sort_keys=False, allow_unicode=True)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--wandb-sweep {path}: cannot write there ({error.strerror}).") from error
    return path


def _project(settings: Any) -> str | None:
    loggers = settings.trainer.get("logger")
    entries = loggers if isinstance(loggers, list) else [loggers]
    ours = [entry for entry in entries if str(getattr(entry, "class_path", "")).endswith(".WandbLogger")]
    return ours[0].init_args.get("project") if ours else None


def _changed(value: Any) -> Iterator[float | None]:
    """Yield what is within a value and means something else once Python has written it and YAML has read it."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _changed(part)
    elif value is None or (isinstance(value, float) and not math.isfinite(value)):
        yield value
