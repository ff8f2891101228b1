"""Decisions that survive a kill: each is written to a file as it is made, and read back by the next attempt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import warn_once
from lightning_normgeo.robustness.results.sample_results import WHOLE, SampleResults, SampleRows
from lightning_normgeo.utilities.files import read_lines
from lightning_normgeo.utilities.spool import Spool, reason_of


class Journal(SampleResults):
    """Decisions kept in a file until the evaluation has ended and its results are written.

    What cannot be written waits for room; no error of the file stops the evaluation.

    Args:
        attacks: the names, ``clean`` first.
        folder: where the file goes; nothing is written without one.
        identity: of the evaluation, see :func:`identity_of`: only what was begun with the same is gone on with.
        rank: of the process; each writes a file of its own, and reads those of all.
    """

    def __init__(self, attacks: Sequence[str], folder: Path | None, identity: str, rank: int = 0) -> None:
        super().__init__(attacks)
        self._folder, self._stem = folder, f"robustness-{identity}"
        self._spool = None if folder is None else Spool(folder / f"{self._stem}-{rank}.jsonl")
        self._said = False
        self._read()

    def add(self, attack: str, rows: SampleRows) -> None:
        """Add samples, and write them down."""
        super().add(attack, rows)
        if self._spool is None:
            return
        line = json.dumps({"attack": attack, **{name: values.tolist() for name, values in rows._asdict().items()}})
        self._spool.append(line, spare=True)
        if self._spool.error is not None and not self._said:
            self._said = True
            warn_once(
                f"The evaluation goes on, but what is killed now cannot be resumed: {self._spool.path} cannot be "
                f"written ({reason_of(self._spool.error)})."
            )

    def close(self, ended: bool = False) -> None:
        """Close the file; remove those of all processes if the evaluation has ended and its results are written."""
        if self._spool is not None:
            self._spool.close()
        for path in self._paths() if ended else []:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        """The files that are there, of all processes."""
        try:
            return [] if self._folder is None else sorted(self._folder.glob(f"{self._stem}-*.jsonl"))
        except OSError:
            return []

    def _read(self) -> None:
        """Take over what an earlier attempt was done with, attack by attack."""
        for attack, rows in _lines(self._paths()):
            if attack in self._rows:
                known = self.done.setdefault(attack, set())
                fresh = rows.at(torch.tensor([sample not in known for sample in rows.sample.tolist()]))
                known.update(fresh.sample.tolist())
                super().add(attack, fresh)


def identity_of(settings: Mapping[str, Any], module: nn.Module, images: Tensor, dataloader: Any, name: str = "") -> str:
    """Return a name for an evaluation: the same for the same settings, weights and data, as far as is known at once.

    Args:
        settings: as plain values.
        module: the model.
        images: the first batch.
        dataloader: the loader; how many samples it has is taken into account.
        name: of the evaluation and the loader, where there are several.

    Cost: one pass over the weights on the host.
    """
    known = [settings, name, size_of(dataloader)]
    digest = hashlib.blake2b(json.dumps(known, sort_keys=True, default=str).encode(), digest_size=10)
    for name, value in (*module.state_dict().items(), ("images", images)):
        if isinstance(value, Tensor):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def size_of(dataloader: Any) -> int | None:
    """Return how many samples a loader has, or None where it does not say."""
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError):
        return None


def _lines(paths: Sequence[Path]) -> Iterator[tuple[str, SampleRows]]:
    for path in paths:
        with suppress(OSError):  # one that cannot be read is done again
            for line in read_lines(path):
                rows = _rows(line)
                if rows is not None:
                    yield str(line.get("attack")), rows


def _rows(line: Mapping[str, Any]) -> SampleRows | None:
    """The samples of a line, or None where it is one of something else, or damaged."""
    try:
        columns = [
            torch.tensor(line[name], dtype=torch.long if name in WHOLE else torch.float32)
            for name in SampleRows._fields
        ]
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        return None
    sizes = {column.shape for column in columns}
    return SampleRows(*columns) if len(sizes) == 1 and columns[0].ndim == 1 and len(columns[0]) else None
