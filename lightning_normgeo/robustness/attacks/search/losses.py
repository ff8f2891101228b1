"""Losses that attacks maximize, one value for each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.errors import UnsuitableError

_TINY = 1e-12
"""Keeps the quotients of DLR finite, as in the published code."""


class LossKind(NamedTuple):
    """A loss in its two forms, and the smallest number of classes that each of them needs."""

    untargeted: Callable[[Tensor, Tensor], Tensor]
    targeted: Callable[[Tensor, Tensor, Tensor], Tensor]
    classes: tuple[int, int] = (2, 2)


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Return −log p_y, in nats."""
    return F.cross_entropy(scores, labels, reduction="none")


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Return max_{j≠y} z_j − z_y (Carlini and Wagner 2017), which is positive for a misclassified image."""
    return _others(scores, labels).amax(1) - _of(scores, labels)


def dlr(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the difference of logits ratio (max_{j≠y} z_j − z_y) / (z_π1 − z_π3) of Croce and Hein 2020.

    π sorts the logits in descending order. The ratio does not change with the scale of the logits.
    """
    ordered = scores.topk(3, dim=1).values
    return margin(scores, labels) / (ordered[:, 0] - ordered[:, 2] + _TINY)


def targeted_cross_entropy(scores: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return log p_t of the target class, in nats."""
    return -F.cross_entropy(scores, targets, reduction="none")


def targeted_margin(scores: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return z_t − z_y."""
    return _of(scores, targets) - _of(scores, labels)


def targeted_dlr(scores: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return (z_t − z_y) / (z_π1 − (z_π3 + z_π4)/2), the targeted form of :func:`dlr`."""
    ordered = scores.topk(4, dim=1).values
    span = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return targeted_margin(scores, labels, targets) / (span + _TINY)


LOSSES = {
    "cross_entropy": LossKind(cross_entropy, targeted_cross_entropy),
    "margin": LossKind(margin, targeted_margin),
    "dlr": LossKind(dlr, targeted_dlr, (3, 4)),
}
"""Losses by name."""


@dataclass(frozen=True)
class Loss:
    """A loss to maximize: against the label, or toward one class after another.

    Attributes:
        name: a name of :data:`LOSSES`.
        targets: number of classes to aim at, the likeliest wrong ones first; 0 for none, to lead away from the label.
    """

    name: str = "cross_entropy"
    targets: int = 0

    def __call__(self, scores: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the loss of each image, ``(batch,)``.

        Args:
            scores: ``(batch, classes)``.
            labels: ``(batch,)`` class indices.
            targets: ``(batch,)`` class indices to aim at; only with :attr:`targets`.

        Raises:
            UnsuitableError: for fewer classes than the loss needs.
        """
        kind = LOSSES[self.name]
        least = kind.classes[self.targets > 0]
        if scores.shape[1] < least:
            raise UnsuitableError(
                f"The loss {self.name!r}{' with targets' if self.targets else ''} needs at least {least} classes, and "
                f"the model has {scores.shape[1]}. Choose loss='margin'."
            )
        if not self.targets:
            return kind.untargeted(scores, labels)
        assert targets is not None  # noqa: S101
        return kind.targeted(scores, labels, targets)

    def target_of(self, clean: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        """Return the class that each start aims at: the likeliest wrong class first, then the next ones in turn.

        Args:
            clean: logits of the clean images.
            labels: ``(batch,)`` class indices.
            start: ``(batch,)`` numbers of the starts, from 0.
        """
        count = min(self.targets, clean.shape[1] - 1)
        order = _others(clean, labels).argsort(1, descending=True)
        return order.gather(1, (start % count)[:, None])[:, 0]

    def starts(self, restarts: int, classes: int) -> int:
        """Return the number of starts: each of the restarts once for every target."""
        return restarts * min(self.targets, classes - 1) if self.targets else restarts


CROSS_ENTROPY = Loss()
"""The loss of the papers on BIM and PGD."""


NO_CLASS = -1
"""The prediction of a sample whose largest logit is not finite."""


def predicted(scores: Tensor) -> Tensor:
    """Return the class of the largest logit, ``(batch,)``, or :data:`NO_CLASS` if that one is not finite.

    A logit of NaN counts as the largest one. Logits of −∞ are those of classes that the model masks.
    """
    return torch.where(scores.amax(1).isfinite(), scores.argmax(1), NO_CLASS)


def at_least_float32(scores: Tensor) -> Tensor:
    """Return logits (or images) in float32 if they are in half precision; others unchanged."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _of(scores: Tensor, classes: Tensor) -> Tensor:
    return scores.gather(1, classes[:, None])[:, 0]


def _others(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the logits with that of the label at minus infinity."""
    return scores.scatter(1, labels[:, None], -torch.inf)
