"""What became of each sample under each attack, and what can be counted from that."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.projected_gradient import lengths, predicted
from lightning_normgeo.robustness.results.npz_columns import read_columns
from lightning_normgeo.utilities.checked_values import UnknownNameError, nearest, shown
from lightning_normgeo.utilities.files import replacing
from lightning_normgeo.utilities.notebook import summary


class SampleRows(NamedTuple):
    """Samples under one attack, one entry for each in every tensor, on the host.

    Attributes:
        index: position in the data set, or the order of arrival where a loader does not tell.
        label: true class.
        prediction: class of the largest logit; -1 where a logit is not finite.
        loss: cross entropy.
        linf: l∞ norm of the perturbation.
        l2: l2 norm.
        gradient: l∞ norm of the loss's gradient at the original image; NaN where it was not needed.
        sample: what the sample is, see :mod:`lightning_normgeo.robustness.results.sample_identity`.
    """

    index: Tensor  # type: ignore[assignment]  # instead of tuple's method, which nobody misses
    label: Tensor
    prediction: Tensor
    loss: Tensor
    linf: Tensor
    l2: Tensor
    gradient: Tensor
    sample: Tensor

    def __repr__(self) -> str:
        return f"Rows({len(self.index)} samples, {int(self.correct.sum())} correct)"

    @property
    def correct(self) -> Tensor:
        """Which samples are classified correctly."""
        return self.prediction == self.label

    def at(self, which: Tensor) -> SampleRows:
        """Return some of the samples, by number or mask."""
        return SampleRows(*(tensor[which] for tensor in self))

    def sorted(self) -> SampleRows:
        """Return the rows by index, each sample once."""
        rows = self.at(torch.argsort(self.index, stable=True))
        rows = rows.at(torch.argsort(rows.sample, stable=True))
        first = torch.ones_like(rows.sample, dtype=torch.bool)
        first[1:] = rows.sample[1:] != rows.sample[:-1]
        rows = rows.at(first)
        return rows.at(torch.argsort(rows.index, stable=True))

    def placed(self, places: Mapping[int, Sequence[tuple[int, int]]]) -> SampleRows:
        """Return a row for each place that a sample has, with its index and the key of the copy; none for others."""
        found = [(row, *place) for row, key in enumerate(self.sample.tolist()) for place in places.get(key, ())]
        if not found:
            return no_rows()
        row, index, sample = torch.tensor(found, dtype=torch.long).unbind(1)
        return self.at(row)._replace(index=index, sample=sample)


WHOLE = ("index", "label", "prediction", "sample")
"""The quantities that are whole numbers."""


@torch.no_grad()
def rows_of(
    images: Tensor, adversarial: Tensor, labels: Tensor, samples: Tensor, scores: Tensor, gradient: Tensor | None = None
) -> SampleRows:
    """Return what became of samples: two transfers to the host.

    Args:
        images: the originals.
        adversarial: what an attack made of them.
        labels: class indices.
        samples: a number for each.
        scores: logits of ``adversarial``.
        gradient: of the loss at ``images``, where it is known.
    """
    perturbation = adversarial - images
    losses = F.cross_entropy(scores, labels, reduction="none")
    slopes = torch.full_like(losses, torch.nan)
    if gradient is not None:
        slopes = lengths(gradient, "linf").nan_to_num(nan=torch.inf)
    whole = torch.stack([samples, labels, predicted(scores)]).cpu()
    real = torch.stack(
        [v.float() for v in (losses, lengths(perturbation, "linf"), lengths(perturbation), slopes)]
    ).cpu()
    return SampleRows(whole[0], whole[1], whole[2], real[0], real[1], real[2], real[3], whole[0])


def no_rows() -> SampleRows:
    """Return the rows of no sample."""
    return SampleRows(
        *(torch.zeros(0, dtype=torch.long if name in WHOLE else torch.float32) for name in SampleRows._fields)
    )


_OF_ALL = ("index", "label", "sample")
_OF_EACH = tuple(name for name in SampleRows._fields if name not in _OF_ALL)


class SampleResults:
    """The rows of every attack of one evaluation.

    Args:
        attacks: the names, ``clean`` first.

    Attributes:
        seen: for each attack, how many samples were right and how many there were, before any is counted twice.
        done: for each attack the samples that are not to be evaluated again.
    """

    def __init__(self, attacks: Sequence[str]) -> None:
        self.done: dict[str, set[int]] = {}
        self._rows: dict[str, list[SampleRows]] = {name: [] for name in attacks}
        self.seen: dict[str, tuple[int, int]] = dict.fromkeys(attacks, (0, 0))

    def __repr__(self) -> str:
        return summary("Decisions", [f"{name} {hits} of {n} correct" for name, (hits, n) in self.seen.items()])

    @property
    def attacks(self) -> list[str]:
        """The names."""
        return list(self._rows)

    def add(self, attack: str, rows: SampleRows) -> None:
        """Add samples."""
        self._rows[attack].append(rows)
        correct, n = self.seen[attack]
        self.seen[attack] = (correct + int(rows.correct.sum()), n + len(rows.index))

    def of(self, attack: str) -> SampleRows:
        """Return all samples of an attack by index.

        Raises:
            UnknownNameError: a KeyError and a ConfigurationError, for an attack that was not evaluated.
        """
        if attack not in self.attacks:
            raise UnknownNameError(f"attack={shown(attack)} was not evaluated; {nearest(attack, self.attacks)}.")
        parts = self._rows[attack]
        if not parts:
            return no_rows()
        return SampleRows(*map(torch.cat, zip(*parts, strict=True))).sorted()

    def without(self, attacks: str | Iterable[str]) -> SampleResults:
        """Return the decisions of the other attacks."""
        left_out = {attacks} if isinstance(attacks, str) else set(attacks)
        others = SampleResults([name for name in self._rows if name not in left_out])
        for name in others.attacks:
            others.add(name, self.of(name))
        return others

    def renamed(self, attack: str, name: str) -> SampleResults:
        """Return one attack's decisions under another name."""
        renamed = SampleResults([name])
        renamed.add(name, self.of(attack))
        return renamed

    @classmethod
    def from_parts(
        cls,
        parts: Iterable[Mapping[str, Sequence[Tensor]]],
        places: Mapping[int, Sequence[tuple[int, int]]] | None = None,
    ) -> SampleResults:
        """Return several processes' rows as one; a sample that several of them had counts once.

        Args:
            parts: for each process the rows of every attack.
            places: of the samples, as :func:`merged_places` returns them; where they are if left out.
        """
        parts = list(parts)
        merged = SampleResults(list(parts[0]))
        for attack in merged.attacks:
            rows = SampleRows(*map(torch.cat, zip(*(part[attack] for part in parts), strict=True))).sorted()
            merged.add(attack, rows if places is None else rows.placed(places))
        return merged

    def arrays(self) -> dict[str, Any]:
        """Return what an ``.npz`` file holds: ``index``, ``label``, ``sample``, and ``{attack}/{quantity}``."""
        clean = self.of("clean")
        found = {name: getattr(clean, name).numpy() for name in _OF_ALL}
        for attack in self.attacks:
            rows = self.of(attack)
            found.update({f"{attack}/{name}": getattr(rows, name).numpy() for name in _OF_EACH})
            found[f"{attack}/correct"] = rows.correct.numpy()
        return found

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` file, replacing one that is there at once; see :meth:`arrays`."""
        import numpy as np

        with replacing(Path(path)) as draft, draft.open("wb") as file:
            np.savez_compressed(file, **self.arrays())


def load_decisions(path: str | Path) -> SampleResults:
    """Read the per-sample decisions of an evaluation.

    Args:
        path: a ``robustness.npz``, or the folder that has one.

    Raises:
        ConfigurationError: if there is none, or it is something else.
    """
    if isinstance(path, (str, Path)) and Path(path).is_dir():
        path = Path(path) / "robustness.npz"
    try:
        arrays = read_columns(path)
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays if "/" in key)
        decisions = SampleResults(list(names))
        for name in names:
            columns = {field: arrays[f"{name}/{field}"] for field in _OF_EACH}
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
