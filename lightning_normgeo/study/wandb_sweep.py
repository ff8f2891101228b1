"""Export of a study as a W&B sweep, so that several machines can share it."""

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
    """Return the configuration of a W&B grid sweep with the same runs as a study.

    Args:
        study: Study to export.
        project: W&B project of the sweep. Default: the one given to ``wandb sweep``.

    Raises:
        ConfigurationError: For a value that ``wandb agent`` would pass to the runs as a different one.
    """
    for option, values in study.grid.items():
        for value in _changed(values):
            raise ConfigurationError(
                f"grid.{option} has the value {text_of(value)}, which wandb agent hands on as the text '{value}'. "
                "Leave it out, or put it into a file and give that as a value of the option config."
            )
    # run as a module, so that the agent's own Python environment is used
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
    """Write the configuration of a W&B sweep as YAML; see :func:`sweep_of`.

    Args:
        study: Study to export.
        settings: Settings of a run, whose WandbLogger names the project.
        path: File to write.

    Raises:
        ConfigurationError: If the file cannot be written, or W&B cannot pass a value on.
    """
    path = Path(path)
    text = yaml.safe_dump(sweep_of(study, _project(settings)), sort_keys=False, allow_unicode=True)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--wandb-sweep {path}: cannot write there ({error.strerror}).") from error
    return path


def _project(settings: Any) -> str | None:
    """Return the W&B project of a run's settings; None without a WandbLogger."""
    loggers = settings.trainer.get("logger")
    entries = loggers if isinstance(loggers, list) else [loggers]
    ours = [entry for entry in entries if str(getattr(entry, "class_path", "")).endswith(".WandbLogger")]
    return ours[0].init_args.get("project") if ours else None


def _changed(value: Any) -> Iterator[float | None]:
    """Yield the parts of a value that change when ``str`` writes them and YAML reads them: null, infinities and NaN."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _changed(part)
    elif value is None or (isinstance(value, float) and not math.isfinite(value)):
        yield value
