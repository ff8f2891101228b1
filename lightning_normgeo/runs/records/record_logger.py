"""Logger that writes the run's own record: JSON lines, flushed one by one, readable after any crash."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

from lightning_normgeo._lightning import Logger
from lightning_normgeo.errors import ConfigurationError, is_rank_zero, warn_once
from lightning_normgeo.runs.folders.new_folders import SharedName, check_writable, claim_version
from lightning_normgeo.runs.records.environment import describe_environment
from lightning_normgeo.runs.records.hyperparameters import as_nested
from lightning_normgeo.runs.records.record import RECORD_NAME
from lightning_normgeo.runs.records.record_lines import as_line, plain_json
from lightning_normgeo.runs.records.value_columns import LayerColumns, Lines, MetricColumns
from lightning_normgeo.utilities.checked_values import short_repr
from lightning_normgeo.utilities.files import as_json, user_path
from lightning_normgeo.utilities.spool import MOST_WAITING, Spool, reason_of

_SPARE = ("metrics", "key_values", "column_values")
"""Kinds of lines that are dropped first when too many wait in memory: a record is readable without them."""


class RecordLogger(Logger):
    """Writes everything that is logged to ``<save_dir>/<name>/<version>/record.jsonl``.

    A Lightning logger like any other, and usable beside them. Each call appends one line and hands it to the
    operating system, so a run that is killed keeps every line up to the last call. Results and images are files
    beside the record. Only rank zero writes.

    A failure to write never stops a training. While the disk is full or unavailable, lines and files wait in memory (at
    most 16 MiB) and are written with the first line for which there is room. The logger warns when such an outage
    begins and reports at the end, and the record gets a line ``outage`` with the numbers of lines that waited and that
    were lost.

    Args:
        save_dir: Folder of all runs; created if needed. ``~`` is the home folder.
        name: Name of the experiment, a folder in ``save_dir``.
        version: Name of the run, a folder in the experiment's; an existing one is appended to. Default: the time at
            which the run starts.

    Raises:
        ConfigurationError: If the folder cannot be written, or a name is no text.
    """

    def __init__(self, save_dir: str = "runs", name: str = "normgeo", version: str | None = None) -> None:
        super().__init__()
        _check_texts(save_dir, name, version)
        self._save_dir = str(user_path(save_dir))
        self._name = name
        self._version = version
        self._claimed = SharedName()
        self._spool: Spool | None = None
        self._described = False
        self._ended = True
        self._waited = 0
        self._said: set[str] = set()
        self._columns, self._keys = LayerColumns(), MetricColumns()
        check_writable(self._save_dir, name)

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._name

    @property
    def version(self) -> str:
        """The run's name within the experiment."""
        if self._version is None:
            self._version = self._claimed.value or claim_version(Path(self._save_dir) / self._name)
            if is_rank_zero():
                self._claimed.value = self._version
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
        """The path of the record."""
        return self.folder / RECORD_NAME

    @property
    def experiment(self) -> Any:
        """An object that accepts every method call and ignores it, for code written for other loggers' experiments."""
        return _NoExperiment()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record scalars at an optimizer step, also NaN and infinite ones; other values are left out with a warning."""
        values = {key: number for key, value in metrics.items() if (number := _number(key, value)) is not None}
        if values:
            self._append_all("metrics", lambda: self._keys.lines(values, step))

    @rank_zero_only
    def log_layers(self, layers: Mapping[str, Mapping[str, float]], step: int | None = None) -> None:
        """Record the values by layer of several quantities at an optimizer step."""
        if layers:
            self._append_all("layers", lambda: self._columns.lines(layers, step))

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any) -> None:
        """Record hyperparameters of any type; see :func:`as_nested`."""
        values = as_nested(params)
        if values:
            self._write("settings", values=values)

    @rank_zero_only
    def log_results(self, name: str, results: Mapping[str, Any]) -> bool:
        """Record results and write them to ``<name>.json`` in the run's folder, atomically replacing an earlier file.

        Args:
            name: Name of the results.
            results: Values of any type, nested; values that JSON does not have become their text.

        Returns:
            Whether both are on the disk.
        """
        recorded = self._write("results", name=name, values=results)
        return self.log_file(f"{name}.json", as_json(plain_json(results))) is True and recorded

    @rank_zero_only
    def log_file(self, name: str, content: bytes) -> bool:
        """Write a file into the run's folder, atomically replacing an earlier one; return whether it is on the disk."""
        return self._opened().put(self.folder / name, content)

    @rank_zero_only
    def log_observation(self, values: Mapping[str, Any]) -> None:
        """Record a summary of a training's measurements, with the number of skipped ones by reason."""
        self._write("observation", values=values)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Save images as PNG files in the run's folder.

        Args:
            key: Key of the images.
            images: uint8 arrays of shape (height, width) or (height, width, 3).
            step: Optimizer step.
            kwargs: ``caption``, a list with one text for each image; other arguments are ignored.
        """
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
        """Record how the run ended, and report lines and files that could not be written."""
        if not self._ended:
            self._write("end", status=status)
            self._ended = True
        if self._spool is not None:
            self._spool.close()  # may end an outage, whose line has to be written as well
            self._note_outage(self._spool)
            self._spool.close()
            self._say_what_is_missing(self._spool)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy that writes to the same run, as in a process that ``ddp_spawn`` starts."""
        return {**vars(self), "_version": self.version, "_claimed": None}

    def _opened(self) -> Spool:
        if self._spool is None:
            self._spool = Spool(self.path)
        return self._spool

    def _write(self, kind: str, **fields: Any) -> bool:
        """Append a line to the record; return whether it is on the disk."""
        return self._append_all(kind, lambda: [(kind, as_line(kind, fields))])

    def _append_all(self, what: str, lines: Callable[[], Lines]) -> bool:
        """Append lines to the record; return whether they are on the disk."""
        try:
            found = lines()
        except Exception as error:  # str() of an object of the user's own class failed
            warn_once(f"RecordLogger cannot keep {what}: {error!r}.", about=f"RecordLogger {what}")
            return False
        written = [self._append(kind, line) for kind, line in found]
        return all(written)

    def _append(self, kind: str, line: str) -> bool:
        if not self._described:
            self._described = True
            self._write("environment", values=_environment())
        self._ended = False
        spool = self._opened()
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
        """Record an outage once it has ended."""
        outage = spool.ended_outage()
        if outage is not None:
            self._waited += outage.waited
            spool.append(as_line("outage", {"values": outage._asdict()}))

    def _say_what_is_missing(self, spool: Spool) -> None:
        missing = []
        if spool.waiting:
            missing.append(f"{spool.waiting} lines")
        if spool.lost:
            missing.append(f"{spool.lost} earlier lines")
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
    """An experiment with every method that those of TensorBoard, W&B or others have; none of them does anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _environment() -> dict[str, str]:
    try:
        return describe_environment()
    except Exception:  # a broken installation of another package
        return {}


def _check_texts(save_dir: Any, name: Any, version: Any) -> None:
    """Check that the arguments of a logger can be parts of a path, before a training has begun."""
    given = {"save_dir": save_dir, "name": name, **({} if version is None else {"version": version})}
    for option, value in given.items():
        if not isinstance(value, (str, PathLike) if option == "save_dir" else str):
            what = "the path of a folder, as 'runs'" if option == "save_dir" else "text, as 'first'"
            raise ConfigurationError(f"RecordLogger({option}={short_repr(value)}): must be {what}.")


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
