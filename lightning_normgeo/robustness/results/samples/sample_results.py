"""Per-sample results of an evaluation under each attack."""

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
from lightning_normgeo.robustness.attacks.search.ball import lengths
from lightning_normgeo.robustness.attacks.search.losses import predicted
from lightning_normgeo.robustness.results.samples.npz_columns import read_columns
from lightning_normgeo.utilities.checked_values import UnknownNameError, nearest, short_repr
from lightning_normgeo.utilities.files import replacing, user_path
from lightning_normgeo.utilities.notebook import summary


class _Columns(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # replaces tuple.index, which is not used
    label: Tensor
    prediction: Tensor
    loss: Tensor
    linf: Tensor
    l2: Tensor
    gradient: Tensor
    sample: Tensor
    checked: Tensor


class SampleRows(_Columns):
    """Per-sample results under one attack, with one entry per sample in every tensor, on the host.

    Attributes:
        index: position in the data set, or number of arrival if the position is not known.
        label: true class.
        prediction: class of the largest logit; -1 if that one is not finite, NaN included.
        loss: cross entropy in nats.
        linf: l∞ norm of the perturbation, in units of the threat model's space.
        l2: l2 norm of the perturbation, in units of the threat model's space.
        gradient: l∞ norm of the gradient of the loss at the original image; NaN if it was not computed.
        sample: key of the sample, see :mod:`lightning_normgeo.robustness.results.samples.sample_identity`.
        checked: why an attack in bfloat16 was repeated in full precision, see :mod:`.verified_decisions`; 0 for not.
            Default: zeros.
    """

    __slots__ = ()

    def __new__(
        cls,
        index: Tensor,
        label: Tensor,
        prediction: Tensor,
        loss: Tensor,
        linf: Tensor,
        l2: Tensor,
        gradient: Tensor,
        sample: Tensor,
        checked: Tensor | None = None,
    ) -> SampleRows:
        """Return per-sample results; most evaluations check no decision and give no such column."""
        checked = torch.zeros_like(sample) if checked is None else checked
        return super().__new__(cls, index, label, prediction, loss, linf, l2, gradient, sample, checked)

    @property
    def columns(self) -> dict[str, Tensor]:
        """The columns by name, without ``checked`` if no decision was."""
        found = self._asdict()
        return found if bool(self.checked.any()) else {k: v for k, v in found.items() if k != "checked"}

    def __repr__(self) -> str:
        return f"Rows({len(self.index)} samples, {int(self.correct.sum())} correct)"

    @property
    def correct(self) -> Tensor:
        """Mask of the samples that are classified correctly."""
        return self.prediction == self.label

    def at(self, which: Tensor) -> SampleRows:
        """Return a part of the samples, chosen by numbers or a mask."""
        return SampleRows(*(tensor[which] for tensor in self))

    def sorted(self) -> SampleRows:
        """Return the results ordered by index, with each sample once."""
        rows = self.at(torch.argsort(self.index, stable=True))
        rows = rows.at(torch.argsort(rows.sample, stable=True))
        first = torch.ones_like(rows.sample, dtype=torch.bool)
        first[1:] = rows.sample[1:] != rows.sample[:-1]
        rows = rows.at(first)
        return rows.at(torch.argsort(rows.index, stable=True))

    def placed(self, places: Mapping[int, Sequence[tuple[int, int]]]) -> SampleRows:
        """Return one result for each place of a sample, with the place as index and the key of the copy as sample.

        Samples without a place are left out.

        Args:
            places: for each key the (place, key of the copy) of its samples.
        """
        found = [(row, *place) for row, key in enumerate(self.sample.tolist()) for place in places.get(key, ())]
        if not found:
            return no_rows()
        row, index, sample = torch.tensor(found, dtype=torch.long).unbind(1)
        return self.at(row)._replace(index=index, sample=sample)


WHOLE = ("index", "label", "prediction", "sample", "checked")
"""Columns of integers."""


@torch.no_grad()
def rows_of(
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    samples: Tensor,
    scores: Tensor,
    gradient: Tensor | None = None,
    checked: Tensor | None = None,
) -> SampleRows:
    """Return the per-sample results of attacked images, on the host.

    Args:
        images: the originals, ``(batch, channels, …)`` in the threat model's space.
        adversarial: the attacked images.
        labels: ``(batch,)`` class indices.
        samples: ``(batch,)`` keys of the samples.
        scores: logits of ``adversarial``.
        gradient: gradient of the loss at ``images``, if it is known.
        checked: why attacks were repeated, see :class:`SampleRows`. Default: none was.

    Cost: two transfers to the host.
    """
    perturbation = adversarial - images
    losses = F.cross_entropy(scores, labels, reduction="none")
    slopes = torch.full_like(losses, torch.nan)
    if gradient is not None:
        slopes = lengths(gradient, "linf").nan_to_num(nan=torch.inf)
    checked = torch.zeros_like(labels) if checked is None else checked
    whole = torch.stack([samples, labels, predicted(scores), checked]).cpu()
    real = torch.stack(
        [v.float() for v in (losses, lengths(perturbation, "linf"), lengths(perturbation), slopes)]
    ).cpu()
    return SampleRows(whole[0], whole[1], whole[2], real[0], real[1], real[2], real[3], whole[0], whole[3])


def no_rows() -> SampleRows:
    """Return per-sample results without any sample."""
    return SampleRows(
        *(torch.zeros(0, dtype=torch.long if name in WHOLE else torch.float32) for name in SampleRows._fields)
    )


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
