"""What became of each sample under each attack, and what can be counted from that."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError


class Rows(NamedTuple):
    """Samples under one attack, one entry for each in every tensor, on the host.

    Attributes:
        index: position in the data set.
        label: true class.
        prediction: class of the largest logit.
        loss: cross entropy.
        linf: l∞ norm of the perturbation.
        l2: l2 norm.
        gradient: l∞ norm of the loss's gradient at the original image; NaN where it was not needed.
    """

    index: Tensor  # type: ignore[assignment]  # instead of tuple's method, which nobody misses
    label: Tensor
    prediction: Tensor
    loss: Tensor
    linf: Tensor
    l2: Tensor
    gradient: Tensor

    @property
    def correct(self) -> Tensor:
        """Which samples are classified correctly."""
        return self.prediction == self.label

    def sorted(self) -> Rows:
        """Return the rows by index, each sample once."""
        order = torch.argsort(self.index, stable=True)
        rows = Rows(*(tensor[order] for tensor in self))
        first = torch.ones_like(rows.index, dtype=torch.bool)
        first[1:] = rows.index[1:] != rows.index[:-1]
        return Rows(*(tensor[first] for tensor in rows))


WHOLE = ("index", "label", "prediction")


def rows_of(values: Tensor) -> Rows:
    """Return rows from one float64 matrix with a line for each quantity: one transfer brings all of them."""
    return Rows(
        *(line.long() if name in WHOLE else line.float() for name, line in zip(Rows._fields, values, strict=True))
    )


class Decisions:
    """The rows of every attack of one evaluation.

    Args:
        attacks: the names, ``clean`` first.

    Attributes:
        seen: for each attack, how many samples were right and how many there were, before any is counted twice.
        done: indices of samples that are not to be evaluated again.
    """

    def __init__(self, attacks: Sequence[str]) -> None:
        self.done: set[int] = set()
        self._rows: dict[str, list[Rows]] = {name: [] for name in attacks}
        self.seen: dict[str, tuple[int, int]] = dict.fromkeys(attacks, (0, 0))

    @property
    def attacks(self) -> list[str]:
        """The names."""
        return list(self._rows)

    def add(self, attack: str, rows: Rows) -> None:
        """Add samples."""
        self._rows[attack].append(rows)
        correct, n = self.seen[attack]
        self.seen[attack] = (correct + int(rows.correct.sum()), n + len(rows.index))

    def of(self, attack: str) -> Rows:
        """Return all samples of an attack by index."""
        parts = self._rows[attack]
        if not parts:
            return rows_of(torch.zeros(len(Rows._fields), 0, dtype=torch.float64))
        return Rows(*map(torch.cat, zip(*parts, strict=True))).sorted()

    def renamed(self, attack: str, name: str) -> Decisions:
        """Return one attack's decisions under another name."""
        renamed = Decisions([name])
        renamed.add(name, self.of(attack))
        return renamed

    @classmethod
    def from_parts(cls, parts: Iterable[Mapping[str, Sequence[Tensor]]]) -> Decisions:
        """Return several processes' rows as one; a sample that several of them had counts once."""
        parts = list(parts)
        merged = Decisions(list(parts[0]))
        for part in parts:
            for attack, rows in part.items():
                merged.add(attack, Rows(*rows))
        return merged

    def arrays(self) -> dict[str, Any]:
        """Return what an ``.npz`` file holds: ``index``, ``label``, and ``{attack}/{quantity}``."""
        clean = self.of("clean")
        found = {"index": clean.index.numpy(), "label": clean.label.numpy()}
        for attack in self.attacks:
            rows = self.of(attack)
            found.update({f"{attack}/{name}": getattr(rows, name).numpy() for name in Rows._fields[2:]})
            found[f"{attack}/correct"] = rows.correct.numpy()
        return found

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` file; see :meth:`arrays`."""
        import numpy as np

        np.savez_compressed(path, **self.arrays())


def load_decisions(path: str | Path) -> Decisions:
    """Read the per-sample decisions of an evaluation.

    Args:
        path: a ``robustness.npz``.

    Raises:
        ConfigurationError: if there is none, or it is something else.
    """
    import numpy as np

    try:
        # numpy leaves a file that it cannot read open
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays: Mapping[str, Any] = dict(file)
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays if "/" in key)
        decisions = Decisions(list(names))
        for name in names:
            columns = [arrays["index"], arrays["label"], *(arrays[f"{name}/{field}"] for field in Rows._fields[2:])]
            if {column.shape for column in columns} != {(len(arrays["index"]),)}:
                raise ValueError(f"the arrays of {name} differ in length")
            decisions.add(name, Rows(*map(torch.from_numpy, columns)))
        decisions.of("clean")
    except (OSError, KeyError, TypeError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise ConfigurationError(
            f"{path} is not what RobustnessEvaluation wrote ({error!r}). Give a robustness.npz."
        ) from error
    return decisions
