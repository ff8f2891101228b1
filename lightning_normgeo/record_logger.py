"""The run's own durable record: JSON lines, flushed one by one, readable after any crash."""

from __future__ import annotations

import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_normgeo._lightning import Logger
from lightning_normgeo.environment import describe_environment
from lightning_normgeo.errors import ConfigurationError, is_rank_zero
from lightning_normgeo.files import open_lines, write_document
from lightning_normgeo.hyperparameters import as_nested
from lightning_normgeo.record import RECORD_NAME


class RecordLogger(Logger):
    """Writes everything that is logged to ``<save_dir>/<name>/<version>/record.jsonl``.

    A Lightning logger like any other, and usable beside them. Each call appends one line and flushes it to the
    operating system, so a run that is killed keeps every line up to the last call. Results and images are files
    beside the record. Only rank zero writes.

    Args:
        save_dir: where all runs live; made if needed.
        name: of the experiment.
        version: of the run; the time it starts if left out. Giving an existing one appends to its record.

    Raises:
        ConfigurationError: if the folder cannot be written.
    """

    def __init__(self, save_dir: str = "runs", name: str = "normgeo", version: str | None = None) -> None:
        super().__init__()
        self._save_dir, self._name, self._version = save_dir, name, version
        self._file: TextIO | None = None
        self._described = False
        check_writable(save_dir, name)

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._name

    @property
    def version(self) -> str:
        """The run's name within the experiment."""
        if self._version is None:
            self._version = _claim_version(Path(self._save_dir) / self._name)
        return self._version

    @property
    def save_dir(self) -> str:
        """The folder of all runs."""
        return self._save_dir

    @property
    def log_dir(self) -> str:
        """The run's folder, as Lightning's loggers give it."""
        return str(self.folder)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self._save_dir) / self._name / self.version

    @property
    def path(self) -> Path:
        """The record."""
        return self.folder / RECORD_NAME

    @property
    def experiment(self) -> Any:
        """Something that takes whatever projects call on other loggers' experiments, and does nothing with it."""
        return _NoExperiment()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record scalars at a step; values that are not finite are left out."""
        values = {key: float(value) for key, value in metrics.items()}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        if finite:
            self._write("metrics", step=step, values=finite)

    @rank_zero_only
    def log_layers(self, layers: Mapping[str, Mapping[str, float]], step: int | None = None) -> None:
        """Record one value per layer for several quantities."""
        if layers:
            self._write("layers", step=step, values=layers)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any) -> None:
        """Record settings."""
        values = as_nested(params)
        if values:
            self._write("settings", values=values)

    @rank_zero_only
    def log_results(self, name: str, results: Mapping[str, Any]) -> None:
        """Write ``<name>.json`` into the run's folder, replacing an earlier one, and record it."""
        self._write("results", name=name, values=results)
        write_document(self.folder / f"{name}.json", _plain(results))

    @rank_zero_only
    def log_observation(self, values: Mapping[str, Any]) -> None:
        """Record what the monitors of a training have measured, what they left out, and why."""
        self._write("observation", values=values)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Save images as PNG files in the run's folder; ``caption`` may give one text for each."""
        from PIL import Image

        folder = self.folder / "images"
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{key.replace('/', '-')}-{i}.png" for i in range(len(images))]
        for file, image in zip(files, images, strict=True):
            Image.fromarray(image).save(file)
        names = [str(file.relative_to(self.folder)) for file in files]
        self._write("images", step=step, key=key, files=names, captions=kwargs.get("caption"))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Record how the run ended."""
        if self._file is not None:
            self._write("end", status=status)
            self._file.close()
            self._file = None

    def _write(self, kind: str, **fields: Any) -> None:
        if self._file is None:
            self._file = open_lines(self.path)
            if not self._described:
                self._described = True
                self._write("environment", values=describe_environment())
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **_plain(fields)}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open file, which belongs to one process."""
        return {**self.__dict__, "_file": None}


class _NoExperiment:
    """Has every method that a project may know from TensorBoard, W&B or others; none of them does anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def check_writable(save_dir: str, name: str) -> None:
    """Make sure that runs can be written to ``save_dir/name``, on rank zero.

    Raises:
        ConfigurationError: naming the folder and the reason.
    """
    if not is_rank_zero():
        return
    folder = Path(save_dir) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"RecordLogger(save_dir={save_dir!r}): cannot write there ({error.strerror}). Choose another folder."
        ) from error


def _claim_version(folder: Path) -> str:
    """Make and return a run folder that nobody else has; other ranks only need a name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for version in [stamp, *(f"{stamp}-{i}" for i in range(1, 1000))]:
        if not is_rank_zero():
            return version
        try:
            (folder / version).mkdir(parents=True)
        except FileExistsError:
            continue
        return version
    raise ConfigurationError(f"{folder} has a thousand runs that started at {stamp}; give version=… a name.")


def _plain(value: Any) -> Any:
    """Return ``value`` as what JSON has; anything else becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
