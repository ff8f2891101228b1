"""Journal of finished samples: results written to a file at once, from which a killed evaluation resumes."""

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
from lightning_normgeo.robustness.attacks.random_numbers.counter_random import DRAWS
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.samples.sample_rows import WHOLE, SampleRows
from lightning_normgeo.utilities.files import read_lines
from lightning_normgeo.utilities.spool import Spool, reason_of


class Journal(SampleResults):
    """Per-sample results that are also kept in a file until the evaluation has ended and its results are written.

    Lines that cannot be written are kept in memory and tried again later; no error of the file stops the evaluation.

    Args:
        attacks: names of the attacks, ``clean`` first.
        folder: folder of the journal; None to write nothing.
        identity: identity of the evaluation, see :func:`identity_of`; only journals with the same identity are read.
        rank: rank of the process; each process writes a file of its own, and reads those of all.
    """

    def __init__(self, attacks: Sequence[str], folder: Path | None, identity: str, rank: int = 0) -> None:
        super().__init__(attacks)
        self._folder, self._stem = folder, f"robustness-{identity}"
        self._spool = None if folder is None else Spool(folder / f"{self._stem}-{rank}.jsonl")
        self._said = False
        self._read()

    def add(self, attack: str, rows: SampleRows) -> None:
        """Add finished samples, and write them to the journal."""
        super().add(attack, rows)
        if self._spool is None:
            return
        line = json.dumps({"attack": attack, **{name: values.tolist() for name, values in rows.columns.items()}})
        self._spool.append(line, spare=True)
        if self._spool.error is not None and not self._said:
            self._said = True
            warn_once(
                f"The evaluation continues, but if it is killed it cannot be resumed: {self._spool.path} cannot be "
                f"written ({reason_of(self._spool.error)})."
            )

    def close(self, ended: bool = False) -> None:
        """Close the file; ``ended`` removes the files of all processes, once the results are written."""
        if self._spool is not None:
            self._spool.close()
        for path in self._paths() if ended else []:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        """Return the existing files of this journal, of all processes."""
        try:
            return [] if self._folder is None else sorted(self._folder.glob(f"{self._stem}-*.jsonl"))
        except OSError:
            return []

    def _read(self) -> None:
        """Read the finished samples of earlier attempts."""
        for attack, rows in _lines(self._paths()):
            if attack in self._rows:
                known = self.done.setdefault(attack, set())
                fresh = rows.at(torch.tensor([sample not in known for sample in rows.sample.tolist()]))
                known.update(fresh.sample.tolist())
                super().add(attack, fresh)


def identity_of(settings: Mapping[str, Any], module: nn.Module, images: Tensor, dataloader: Any, name: str = "") -> str:
    """Return a hash of an evaluation's settings, weights and data, which an attempt to resume it has again.

    Of the data it covers the first batch and the number of samples. It also covers the version of the random draws.

    Args:
        settings: the settings as plain values.
        module: the model.
        images: the first batch.
        dataloader: the loader.
        name: names of the evaluation and the loader, if there are several.

    Cost: one pass over the weights on the host.
    """
    known = [settings, DRAWS, name, size_of(dataloader)]
    digest = hashlib.blake2b(json.dumps(known, sort_keys=True, default=str).encode(), digest_size=10)
    for name, value in (*module.state_dict().items(), ("images", images)):
        if isinstance(value, Tensor):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def size_of(dataloader: Any) -> int | None:
    """Return the number of samples of a loader, or None if its data set has no length."""
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError):
        return None


def _lines(paths: Sequence[Path]) -> Iterator[tuple[str, SampleRows]]:
    """Yield the attack and the samples of each valid line."""
    for path in paths:
        with suppress(OSError):  # samples of a file that cannot be read are evaluated again
            for line in read_lines(path):
                rows = _rows(line)
                if rows is not None:
                    yield str(line.get("attack")), rows


def _rows(line: Mapping[str, Any]) -> SampleRows | None:
    """Return the samples of a line, or None if the line is damaged or not one of a journal."""
    try:
        columns = [
            torch.tensor(line[name], dtype=torch.long if name in WHOLE else torch.float32)
            for name in SampleRows._fields
            if name != "checked" or name in line
        ]
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        return None
    sizes = {column.shape for column in columns}
    return SampleRows(*columns) if len(sizes) == 1 and columns[0].ndim == 1 and len(columns[0]) else None
