"""The run's own durable record: JSON lines, flushed one by one, readable after any crash."""

from __future__ import annotations

import io
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

from lightning_normgeo._lightning import Logger
from lightning_normgeo.errors import ConfigurationError, is_rank_zero, warn_once
from lightning_normgeo.runs.environment import describe_environment
from lightning_normgeo.runs.hyperparameters import as_nested
from lightning_normgeo.runs.record import RECORD_NAME
from lightning_normgeo.runs.record_lines import as_line, plain
from lightning_normgeo.utilities.files import as_json
from lightning_normgeo.utilities.spool import MOST_WAITING, Spool, reason_of

_SPARE = ("metrics", "layers")
"""Kinds of lines that a run is readable without."""


class RecordLogger(Logger):
    """Writes everything that is logged to ``<save_dir>/<name>/<version>/record.jsonl``.

    A Lightning logger like any other, and usable beside them. Each call appends one line and hands it to the
    operating system, so a run that is killed keeps every line up to the last call. Results and images are files
    beside the record. Only rank zero writes.

    Nothing that is logged stops a training. While the disk is full, or away, lines and files wait in memory (16 MiB)
    and are written with the first line for which there is room; that is said when it begins and at the end, and the
    record has a line ``outage`` with the number of lines that waited and that were lost.

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
        self._spool: Spool | None = None
        self._described, self._ended = False, True
        self._waited = 0
        self._said: set[str] = set()
        check_writable(save_dir, name)

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._name

    @property
    def version(self) -> str:
        """The run's name within the experiment."""
        if self._version is None:
            self._version = claim_version(Path(self._save_dir) / self._name)
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
        """Record scalars at a step, also those that are not finite; what is no number is left out."""
        values = {key: number for key, value in metrics.items() if (number := _number(key, value)) is not None}
        if values:
            self._write("metrics", step=step, values=values)

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
    def log_results(self, name: str, results: Mapping[str, Any]) -> bool:
        """Record results and write ``<name>.json`` into the run's folder; return whether both are on the disk.

        The file replaces an earlier one at once.
        """
        recorded = self._write("results", name=name, values=results)
        return self.log_file(f"{name}.json", as_json(plain(results))) is True and recorded

    @rank_zero_only
    def log_file(self, name: str, content: bytes) -> bool:
        """Write a file into the run's folder, replacing an earlier one at once; return whether it is on the disk."""
        return self._opened().put(self.folder / name, content)

    @rank_zero_only
    def log_observation(self, values: Mapping[str, Any]) -> None:
        """Record what the monitors of a training have measured, what they left out, and why."""
        self._write("observation", values=values)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Save images as PNG files in the run's folder; ``caption`` may give one text for each."""
        names = [f"images/{key.replace('/', '-')}-{number}.png" for number in range(len(images))]
        try:
            files = {name: _png(image) for name, image in zip(names, images, strict=True)}
        except Exception as error:
            warn_once(f"RecordLogger cannot keep the images {key!r}: {error!r}. It takes arrays of bytes.", about=key)
            return
        for name, content in files.items():
            self.log_file(name, content)
        self._write("images", step=step, key=key, files=names, captions=kwargs.get("caption"))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Record how the run ended, and say what could not be written."""
        if not self._ended:
            self._write("end", status=status)
            self._ended = True
        if self._spool is not None:
            self._spool.close()
            self._note_outage(self._spool)
            self._spool.close()
            self._say_what_is_missing(self._spool)

    def _opened(self) -> Spool:
        if self._spool is None:
            self._spool = Spool(self.path)
        return self._spool

    def _write(self, kind: str, **fields: Any) -> bool:
        """Append a line; return whether it is on the disk."""
        if not self._described:
            self._described = True
            self._write("environment", values=_environment())
        self._ended, spool = False, self._opened()
        try:
            line = as_line(kind, fields)
        except Exception as error:  # of somebody's own class, whose text it is to have
            warn_once(f"RecordLogger cannot keep {kind}: {error!r}.", about=f"RecordLogger {kind}")
            return False
        written = spool.append(line, spare=kind in _SPARE)
        if spool.error is not None:
            self._say(
                f"{self.path} cannot be written ({reason_of(spool.error)}). Training goes on: what is logged waits in "
                f"memory, {MOST_WAITING // 2**20} MiB at most, until there is room.",
                about="outage",
            )
        self._note_outage(spool)
        return written

    def _note_outage(self, spool: Spool) -> None:
        """Record that lines could not be written for a time, once they can be."""
        outage = spool.ended_outage()
        if outage is not None:
            self._waited += outage.waited
            spool.append(as_line("outage", {"values": outage._asdict()}))

    def _say_what_is_missing(self, spool: Spool) -> None:
        missing = [f"{spool.waiting} lines"] * bool(spool.waiting)
        missing += [f"{spool.lost} earlier lines"] * bool(spool.lost)
        missing += [f"{path.name} ({why})" for path, why in spool.files.items()]
        if missing:
            self._say(f"{self.folder}: {', '.join(missing)} could not be written.")
        elif self._waited:
            rank_zero_info(f"{self.path}: {self._waited} lines had to wait for the disk; all of them are written.")
            self._waited = 0

    def _say(self, text: str, about: str = "") -> None:
        if (about or text) not in self._said:
            self._said.add(about or text)
            warn_once(text)


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


def claim_version(folder: Path) -> str:
    """Make and return a run folder that nobody else has; other ranks only need a name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for version in [stamp, *(f"{stamp}-{i}" for i in range(1, 1000))]:
        if not is_rank_zero():
            return version
        try:
            (folder / version).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # a full disk: it is made with the first line for which there is room
            return version
        return version
    raise ConfigurationError(f"{folder} has a thousand runs that started at {stamp}; give version=… a name.")


def _environment() -> dict[str, str]:
    try:
        return describe_environment()
    except Exception:  # a broken installation of another package
        return {}


def _number(key: str, value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        warn_once(f"RecordLogger keeps numbers only, and leaves out {key!r}, {type(value).__name__}.", about=key)
        return None


def _png(image: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
