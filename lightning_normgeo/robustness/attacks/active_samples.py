"""Attacks that end for a sample once it is broken: only samples that still stand take part in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.projected_gradient import Ball, Logits, ascent, at_least_float32, predicted
from lightning_normgeo.robustness.attacks.registry import AttackBatch, ProjectedGradient


@dataclass(frozen=True)
class ActiveSamples:
    """Samples under attack, one entry for each in every tensor.

    Attributes:
        images: the originals.
        adversarial: the iterate.
        labels: class indices.
        indices: position in the data set.
        step: how many steps led to the iterate.
        restart: which start they began from.
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    indices: Tensor
    step: Tensor
    restart: Tensor

    def __getitem__(self, which: Tensor | slice) -> ActiveSamples:
        """Return some of the samples."""
        return ActiveSamples(*(tensor[which] for tensor in self.tensors))

    def __len__(self) -> int:
        """Return how many there are."""
        return self.labels.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in order."""
        return self.images, self.adversarial, self.labels, self.indices, self.step, self.restart

    @staticmethod
    def joined(*parts: ActiveSamples) -> ActiveSamples:
        """Return all samples of several."""
        return ActiveSamples(*map(torch.cat, zip(*(part.tensors for part in parts), strict=True)))


class FinishedSamples(NamedTuple):
    """Samples whose attack has ended: at the first iterate that broke them, or at the last."""

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    indices: Tensor
    scores: Tensor


def any_iterate(attack: ProjectedGradient, batch: AttackBatch, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first iterate of any start that breaks each sample, else the last one, and its logits.

    For models whose logits depend on the batch: all samples take part in every pass.

    Args:
        attack: BIM or PGD.
        batch: of the loader.
        scores: logits of the images themselves.
    """
    ball, step_size = attack.ball(batch)
    found, found_scores = batch.images.clone(), scores.clone()
    standing = predicted(scores) == batch.labels
    for restart in range(attack.restarts):
        start = ball.sample(batch.images, batch.seed, batch.indices, restart) if attack.random_start else batch.images
        for iterate, now in _iterates(batch, ball, step_size, attack.steps, start):
            found[standing], found_scores[standing] = iterate[standing], now[standing]
            standing = standing & (predicted(now) == batch.labels)
            if not bool(standing.any()):
                return found, found_scores
    return found, found_scores


def _iterates(
    batch: AttackBatch, ball: Ball, step_size: float, steps: int, start: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the iterates of one start with their logits, the start itself first."""
    iterate = start
    for _ in range(steps):
        scores, _, gradient = ascent(batch.logits, iterate, batch.labels)
        yield iterate, scores
        iterate = ball.project(ball.ascend(iterate, gradient, step_size), batch.images)
    iterate = ball.finish(iterate)
    with torch.no_grad():
        yield iterate, at_least_float32(batch.logits(iterate))


class ActiveSet:
    """Runs one attack on a stream of samples, in batches that are filled up as samples fall.

    A sample is broken at the first iterate of any start, the image itself included, that the model gets wrong. What
    happens to a sample does not depend on the others, except for rounding.

    Args:
        ball: what an adversarial image may be.
        step_size: of one iteration.
        steps: iterations.
        restart: returns random starts of samples; None to start at the image.
        restarts: how often to start.
        batch_size: samples per pass.
        ended: is given the samples that are done.
    """

    def __init__(
        self,
        ball: Ball,
        step_size: float,
        steps: int,
        restart: Callable[[Tensor, Tensor, int], Tensor] | None,
        restarts: int,
        batch_size: int,
        ended: Callable[[FinishedSamples], None],
    ) -> None:
        self.ball, self.step_size, self.steps = ball, step_size, steps
        self.restart, self.restarts = restart, restarts
        self.batch_size = batch_size
        self.ended = ended
        self.passes = 0.0
        self._moving: ActiveSamples | None = None
        self._arrived: ActiveSamples | None = None

    def put(self, images: Tensor, labels: Tensor, indices: Tensor, scores: Tensor, gradient: Tensor | None) -> None:
        """Add samples.

        Args:
            images: of the threat model's space.
            labels: class indices.
            indices: position in the data set.
            scores: logits of ``images``.
            gradient: of the loss at ``images``, where it is known; ignored with random starts.
        """
        broken = predicted(scores) != labels
        self.ended(FinishedSamples(*(t[broken] for t in (images, images, labels, indices, scores))))
        images, labels, indices = (tensor[~broken] for tensor in (images, labels, indices))
        zero = torch.zeros_like(labels)
        fresh = ActiveSamples(images, images, labels, indices, zero, zero)
        if self.restart is not None:
            self._move(self._started(fresh))
        elif gradient is None:
            self._move(fresh)
        else:
            self._step(fresh, gradient[~broken])

    def run(self, logits: Logits, everything: bool = False) -> None:
        """Attack while there are full batches, or until nothing is left.

        Args:
            logits: the model, for images of the threat model's space.
            everything: whether to run the batches that are not full as well.
        """
        least = 1 if everything else self.batch_size
        while True:
            if self._arrived is not None and len(self._arrived) >= self.batch_size:
                self._judge(logits)
            elif self._moving is not None and len(self._moving) >= least:
                self._advance(logits)
            elif everything and self._arrived is not None and len(self._arrived):
                self._judge(logits)
            else:
                return

    def _advance(self, logits: Logits) -> None:
        """One forward and backward pass."""
        assert self._moving is not None  # noqa: S101
        batch, self._moving = self._moving[: self.batch_size], self._moving[self.batch_size :]
        scores, _, gradient = ascent(logits, batch.adversarial, batch.labels)
        self.passes += len(batch)
        broken = predicted(scores) != batch.labels
        self._end(batch, scores, broken)
        self._step(batch[~broken], gradient[~broken])

    def _judge(self, logits: Logits) -> None:
        """One forward pass of last iterates."""
        assert self._arrived is not None  # noqa: S101
        batch, self._arrived = self._arrived[: self.batch_size], self._arrived[self.batch_size :]
        with torch.no_grad():
            scores = at_least_float32(logits(batch.adversarial))
        self.passes += len(batch) / 3
        done = (predicted(scores) != batch.labels) | (batch.restart + 1 >= self.restarts)
        self._end(batch, scores, done)
        again = batch[~done]
        if len(again):
            self._move(self._started(replace(again, restart=again.restart + 1, step=torch.zeros_like(again.step))))

    def _step(self, batch: ActiveSamples, gradient: Tensor) -> None:
        moved = self.ball.project(self.ball.ascend(batch.adversarial, gradient, self.step_size), batch.images)
        batch = replace(batch, adversarial=moved, step=batch.step + 1)
        arrived = batch.step >= self.steps
        last = batch[arrived]
        last = replace(last, adversarial=self.ball.finish(last.adversarial))
        self._arrived = last if self._arrived is None else ActiveSamples.joined(self._arrived, last)
        self._move(batch[~arrived])

    def _move(self, batch: ActiveSamples) -> None:
        """Let samples take part in the next pass: those that began first, so that few wait at a time."""
        self._moving = batch if self._moving is None else ActiveSamples.joined(batch, self._moving)

    def _started(self, batch: ActiveSamples) -> ActiveSamples:
        assert self.restart is not None  # noqa: S101
        starts = [
            self.restart(one.images, one.indices, int(k))
            for k in torch.unique(batch.restart)
            for one in [batch[batch.restart == k]]
        ]
        order = torch.argsort(batch.restart, stable=True)
        return replace(batch[order], adversarial=torch.cat(starts) if starts else batch.adversarial)

    def _end(self, batch: ActiveSamples, scores: Tensor, done: Tensor) -> None:
        ended = batch[done]
        self.ended(FinishedSamples(ended.images, ended.adversarial, ended.labels, ended.indices, scores[done]))
