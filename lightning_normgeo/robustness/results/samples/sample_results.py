"""Per-sample results of an evaluation under each attack."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.results.samples.npz_columns import read_columns
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows, no_rows
from lightning_normgeo.utilities.checked_values import UnknownNameError, nearest, short_repr
from lightning_normgeo.utilities.files import replacing, user_path
from lightning_normgeo.utilities.notebook import summary

_OF_ALL = ("index", "label", "sample")
_OF_EACH = tuple(name for name in SampleRows._fields if name not in _OF_ALL)


class SampleResults:
    """The per-sample results of every attack of one evaluation.

    Args:
        attacks: names of the attacks, ``clean`` first.

    Attributes:
        seen: numbers of correct and of all samples added so far, by attack; repeated samples count each time.
        done: keys of the samples with results of an earlier attempt, which are not evaluated again, by attack.
    """

    def __init__(self, attacks: Sequence[str]) -> None:
        self.done: dict[str, set[int]] = {}
        self._rows: dict[str, list[SampleRows]] = {name: [] for name in attacks}
        self.seen: dict[str, tuple[int, int]] = dict.fromkeys(attacks, (0, 0))

    def __repr__(self) -> str:
        return summary("Decisions", [f"{name} {hits} of {n} correct" for name, (hits, n) in self.seen.items()])

    @property
    def attacks(self) -> list[str]:
        """The names of the attacks."""
        return list(self._rows)

    def add(self, attack: str, rows: SampleRows) -> None:
        """Add samples under an attack."""
        self._rows[attack].append(rows)
        correct, n = self.seen[attack]
        self.seen[attack] = (correct + int(rows.correct.sum()), n + len(rows.index))

    def attach(self, name: str, rows: SampleRows) -> None:
        """Add the results of a row that is made from others."""
        self._rows[name], self.seen[name] = [], (0, 0)
        self.add(name, rows)

    def of(self, attack: str) -> SampleRows:
        """Return the results of all samples under an attack, ordered by index.

        Raises:
            UnknownNameError: a KeyError and a ConfigurationError, for an attack that was not evaluated.
        """
        if attack not in self.attacks:
            raise UnknownNameError(f"attack={short_repr(attack)} was not evaluated; {nearest(attack, self.attacks)}.")
        parts = self._rows[attack]
        if not parts:
            return no_rows()
        return SampleRows(*map(torch.cat, zip(*parts, strict=True))).sorted()

    def without(self, attacks: str | Iterable[str]) -> SampleResults:
        """Return the results of the other attacks."""
        left_out = {attacks} if isinstance(attacks, str) else set(attacks)
        others = SampleResults([name for name in self._rows if name not in left_out])
        for name in others.attacks:
            others.add(name, self.of(name))
        return others

    def renamed(self, attack: str, name: str) -> SampleResults:
        """Return the results of one attack under another name."""
        renamed = SampleResults([name])
        renamed.add(name, self.of(attack))
        return renamed

    @classmethod
    def from_parts(
        cls,
        parts: Iterable[Mapping[str, Sequence[Tensor]]],
        places: Mapping[int, Sequence[tuple[int, int]]] | None = None,
    ) -> SampleResults:
        """Return the merged results of several processes; a sample that several of them had counts once.

        Args:
            parts: for each process the columns of :class:`SampleRows` by attack.
            places: the places of the samples, as :func:`merged_places` returns them. Default: the indices that samples
                have already.
        """
        parts = list(parts)
        merged = SampleResults(list(parts[0]))
        for attack in merged.attacks:
            rows = SampleRows(*map(torch.cat, zip(*(part[attack] for part in parts), strict=True))).sorted()
            merged.add(attack, rows if places is None else rows.placed(places))
        return merged

    def arrays(self) -> dict[str, Any]:
        """Return the arrays of an ``.npz`` file: ``index``, ``label``, ``sample``, and ``{attack}/{quantity}``.

        All have the shape ``(samples,)``. The quantities are ``correct`` and the other columns of :class:`SampleRows`.
        """
        clean = self.of("clean")
        found = {name: getattr(clean, name).numpy() for name in _OF_ALL}
        for attack in self.attacks:
            rows = self.of(attack)
            found |= {f"{attack}/{name}": one.numpy() for name, one in rows.columns.items() if name in _OF_EACH}
            found[f"{attack}/correct"] = rows.correct.numpy()
        return found

    def save(self, path: str | Path) -> None:
        """Write :meth:`arrays` to an ``.npz`` file, replacing an earlier one atomically."""
        import numpy as np

        with replacing(user_path(path)) as draft, draft.open("wb") as file:
            np.savez_compressed(file, **self.arrays())


def load_decisions(path: str | Path) -> SampleResults:
    """Read the per-sample results of an evaluation from a file.

    Args:
        path: a ``robustness.npz`` file, or the folder that contains it.

    Raises:
        ConfigurationError: if there is no such file, or it was not written by an evaluation.
    """
    if isinstance(path, (str, Path)):
        path = user_path(path)
        path = path / "robustness.npz" if path.is_dir() else path
    try:
        arrays = read_columns(path)
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays if "/" in key)
        decisions = SampleResults(list(names))
        for name in names:
            columns = {field: arrays[f"{name}/{field}"] for field in _OF_EACH if field != "checked"}
            if f"{name}/checked" in arrays:
                columns["checked"] = arrays[f"{name}/checked"]
            columns |= {"index": arrays["index"], "label": arrays["label"]}
            columns["sample"] = arrays.get("sample", arrays["index"])
            if {column.shape for column in columns.values()} != {(len(arrays["index"]),)}:
                raise ValueError(f"the arrays of {name} differ in length")
            decisions.add(name, SampleRows(**{field: torch.from_numpy(column) for field, column in columns.items()}))
        decisions.of("clean")
    except (OSError, KeyError, TypeError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise ConfigurationError(
            f"{path} is not what RobustnessEvaluation wrote ({error!r}). Give a robustness.npz, or its folder."
        ) from error
    return decisions
