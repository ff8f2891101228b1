"""Read W&B's offline transaction log: LevelDB's log format around protocol buffers.

W&B has no public Python reader. The file is a 7-byte header, then blocks of 32 KiB that hold chunks: CRC-32 of type
and data, length, type (whole record, or its first, middle or last part).
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK = 32768
CHUNK = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """Content of one log.

    Attributes:
        folder: the run's folder, ``offline-run-…``.
        history: one dictionary for each call of ``log``.
        config: the run's configuration.
        summary: the summary, by key; nested keys are left out.
        hidden: keys of which W&B draws no chart by itself.
        artifacts: for the name of each artifact its type and the paths of its files.
        exit_code: None for a run that has not ended.
    """

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    artifacts: dict[str, tuple[str, list[Path]]] = field(default_factory=dict)
    exit_code: int | None = None

    def points(self, key: str) -> list[tuple[int, float]]:
        """Return the (trainer/global_step, value) pairs of a metric, in the order they were logged."""
        return [(row["trainer/global_step"], row[key]) for row in self.history if key in row]

    def table(self, key: str) -> dict[str, Any]:
        """Return a table's columns and data, from the file the log points to."""
        entry = next(row[key] for row in self.history if key in row)
        assert entry["_type"] == "table-file"
        return json.loads((self.folder / "files" / entry["path"]).read_text())

    def images(self, key: str) -> list[Path]:
        """Return the files of a list of images."""
        entry = next(row[key] for row in self.history if key in row)
        assert entry["_type"] == "images/separated"
        return [self.folder / "files" / name for name in entry["filenames"]]


def raw_records(buffer: bytes) -> Iterator[bytes]:
    """Yield the records of a log's bytes; an incomplete last one is skipped.

    Raises:
        ValueError: for another kind of file, or damaged data.
    """
    if not buffer.startswith(HEADER):
        raise ValueError("not a W&B transaction log")
    position, record = len(HEADER), b""
    while position + CHUNK.size <= len(buffer):
        left = BLOCK - position % BLOCK
        if left < CHUNK.size:
            position += left
            continue
        checksum, length, kind = CHUNK.unpack_from(buffer, position)
        data = buffer[position + CHUNK.size : position + CHUNK.size + length]
        if kind == 0 or len(data) < length:
            return
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"wrong checksum at byte {position}")
        position += CHUNK.size + length
        record = data if kind in (FULL, FIRST) else record + data
        if kind in (FULL, LAST):
            yield record


def read_run(path: Path) -> WandbRun:
    """Read the current content of a ``.wandb`` file."""
    from wandb.proto import wandb_internal_pb2

    run = WandbRun(path.parent)
    for raw in raw_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        match record.WhichOneof("record_type"):
            case "history":
                run.history.append(_nested(record.history.item))
            case "config":
                run.config.update(_nested(record.config.update))
            case "run":
                run.config.update(_nested(record.run.config.update))
            case "summary":
                run.summary.update(
                    {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
                )
            case "metric":
                run.hidden.update([record.metric.name] if record.metric.options.hidden else [])
            case "artifact":
                files = [Path(entry.local_path) for entry in record.artifact.manifest.contents]
                run.artifacts[record.artifact.name] = (record.artifact.type, files)
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def read_finished(folder: Path, patience: float = 20.0) -> WandbRun:
    """Read the only run below ``folder``, once its last record is on disk: ``finish`` returns before that."""
    (path,) = folder.rglob("run-*.wandb")
    deadline = time.monotonic() + patience
    while (run := read_run(path)).exit_code is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has no exit record after {patience} s")
        time.sleep(0.02)
    return run


def _nested(items: Any) -> dict[str, Any]:
    """Return key-value items as a dictionary; a nested key is a path."""
    values: dict[str, Any] = {}
    for item in items:
        *parents, last = list(item.nested_key) or [item.key]
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = json.loads(item.value_json)
    return values
