"""Per-sample results of one attack, as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.robustness.attacks.search.ball import lengths
from lightning_normgeo.robustness.attacks.search.losses import predicted


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
