"""Stages of an evaluation: attacks that take a stream of samples, and pass on those that they do not break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.attack import Attack, AttackBatch
from lightning_normgeo.robustness.attacks.native_attacks import BallAttack
from lightning_normgeo.robustness.attacks.search.active_samples import ActiveSet, FinishedSamples
from lightning_normgeo.robustness.attacks.search.last_points import last_points
from lightning_normgeo.robustness.attacks.search.projected_gradient import Logits
from lightning_normgeo.robustness.attacks.verification import VerifiedSet


class Stage(Protocol):
    """One attack on a stream of samples."""

    def put(
        self, images: Tensor, labels: Tensor, indices: Tensor, scores: Tensor, gradient: Tensor | None = None
    ) -> None:
        """Add samples to be attacked, with the logits of their images."""

    def run(self, logits: Logits, everything: bool = False) -> None:
        """Attack as long as there are full batches, or until all samples have finished."""


class WholeBatches:
    """Runs an attack that takes whole batches, such as one of torchattacks, on a stream of samples.

    Args:
        attack: the attack.
        like: a batch of the evaluation, for everything but its samples.
        batch_size: samples per batch.
        ended: is called with the finished samples.
    """

    def __init__(
        self, attack: Attack, like: AttackBatch, batch_size: int, ended: Callable[[FinishedSamples], None]
    ) -> None:
        self.attack, self.batch_size, self.ended = attack, batch_size, ended
        self._like = like
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def put(
        self, images: Tensor, labels: Tensor, indices: Tensor, scores: Tensor, gradient: Tensor | None = None
    ) -> None:
        """Add samples to be attacked."""
        if len(labels):
            self._waiting.append((images, labels, indices, scores))

    def run(self, logits: Logits, everything: bool = False) -> None:
        """Attack as long as there are full batches, or until all samples have finished."""
        while self._waiting:
            images, labels, indices, scores = map(torch.cat, zip(*self._waiting, strict=True))
            size = min(self.batch_size, len(labels))
            if size < self.batch_size and not everything:
                return
            self._waiting = (
                [(images[size:], labels[size:], indices[size:], scores[size:])] if len(labels) > size else []
            )
            self._attack(images[:size], labels[:size], indices[:size], scores[:size])

    def _attack(self, images: Tensor, labels: Tensor, indices: Tensor, scores: Tensor) -> None:
        batch = replace(
            self._like,
            images=images,
            labels=labels,
            indices=indices.tolist(),
            gradient=None,
            counted=None,
            clean=scores,
        )
        found = last_points(self.attack, batch)
        self.ended(FinishedSamples(images, found.images, labels, indices, found.scores, scores, checked=found.checked))


def stage_of(attack: Attack, batch: AttackBatch, size: int, ended: Callable[[FinishedSamples], None]) -> Stage:
    """Return the stage of an attack for images of the shape of a batch.

    Args:
        attack: the attack.
        batch: a batch of the evaluation.
        size: samples per pass.
        ended: is called with the finished samples.
    """
    if isinstance(attack, BallAttack) and batch.exact is not None:
        rule = attack.rule(batch)
        return VerifiedSet(rule, size, ended, batch.exact, batch.seed, attack.eot, attack.bisections)
    if isinstance(attack, BallAttack):
        return ActiveSet(attack.rule(batch), size, ended, attack.eot, attack.bisections)
    return WholeBatches(attack, batch, size, ended)
