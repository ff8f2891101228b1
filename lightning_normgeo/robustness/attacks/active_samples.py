"""Attacks in which any iterate counts: a sample is attacked only until it is misclassified."""

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
    """Samples under attack, with one entry per sample in every tensor.

    Attributes:
        images: the original images, in the threat model's space.
        adversarial: the current iterates.
        labels: class indices.
        indices: a number for each sample, which seeds its random starts.
        step: number of steps from the start to the iterate.
        restart: number of the current start, from 0.
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    indices: Tensor
    step: Tensor
    restart: Tensor

    def __getitem__(self, which: Tensor | slice) -> ActiveSamples:
        """Return a part of the samples."""
        return ActiveSamples(*(tensor[which] for tensor in self.tensors))

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.labels.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the attributes."""
        return self.images, self.adversarial, self.labels, self.indices, self.step, self.restart

    @staticmethod
    def joined(*parts: ActiveSamples) -> ActiveSamples:
        """Return the samples of all parts as one object."""
        return ActiveSamples(*map(torch.cat, zip(*(part.tensors for part in parts), strict=True)))


class FinishedSamples(NamedTuple):
    """Samples whose attack has ended, at the first misclassified iterate or at the last one, with its logits."""

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    indices: Tensor
    scores: Tensor


def any_iterate(attack: ProjectedGradient, batch: AttackBatch, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's first misclassified iterate over all starts, else its last one, and the logits of these.

    For models whose logits depend on the whole batch: all samples take part in every pass.

    Args:
        attack: BIM or PGD.
        batch: a batch of the loader.
        scores: logits of the clean images, which count as the first iterate.
    """
    ball, step_size = attack.ball(batch)
    found, found_scores = batch.images.clone(), scores.clone()
    correct = predicted(scores) == batch.labels  # under every iterate so far
    for restart in range(attack.restarts):
        start = ball.sample(batch.images, batch.seed, batch.indices, restart) if attack.random_start else batch.images
        for iterate, iterate_scores in _iterates(batch, ball, step_size, attack.steps, start):
            found[correct], found_scores[correct] = iterate[correct], iterate_scores[correct]
            correct = correct & (predicted(iterate_scores) == batch.labels)
            if not bool(correct.any()):
                return found, found_scores
    return found, found_scores


def _iterates(
    batch: AttackBatch, ball: Ball, step_size: float, steps: int, start: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the iterates from one start and their logits, beginning with the start itself."""
    iterate = start
    for _ in range(steps):
        scores, _, gradient = ascent(batch.logits, iterate, batch.labels)
        yield iterate, scores
        iterate = ball.project(ball.ascend(iterate, gradient, step_size), batch.images)
    iterate = ball.finish(iterate)
    with torch.no_grad():
        yield iterate, at_least_float32(batch.logits(iterate))


class ActiveSet:
    """Runs one attack on a stream of samples, in batches that are filled up when samples have finished.

    A sample is finished at its first misclassified iterate (the clean image is one), or after the last iterate of the
    last start. Except for rounding, its result does not depend on the other samples.

    Args:
        ball: the set of allowed images around each original.
        step_size: step size of one iteration, in units of the images.
        steps: number of iterations.
        restart: returns random starts for images, given their indices and the number of the start; None to start at
            the images.
        restarts: number of starts.
        batch_size: samples per pass.
        ended: is called with the finished samples.

    Attributes:
        passes: number of samples that went through a forward and backward pass; a forward pass alone counts a third.
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
        """Add samples to be attacked.

        Args:
            images: ``(batch, channels, …)`` in the threat model's space.
            labels: class indices.
            indices: a number for each sample, which seeds its random starts.
            scores: logits of ``images``.
            gradient: gradient of the loss at ``images``, if it is known; ignored with random starts.
        """
        broken = predicted(scores) != labels  # misclassified without any attack
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
        """Attack as long as there are full batches.

        Args:
            logits: maps images in the threat model's space to logits.
            everything: whether to run batches that are not full too, until all samples have finished.
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
        """Make one step: a forward and backward pass of one batch of iterates."""
        assert self._moving is not None  # noqa: S101
        batch, self._moving = self._moving[: self.batch_size], self._moving[self.batch_size :]
        scores, _, gradient = ascent(logits, batch.adversarial, batch.labels)
        self.passes += len(batch)
        broken = predicted(scores) != batch.labels
        self._end(batch, scores, broken)
        self._step(batch[~broken], gradient[~broken])

    def _judge(self, logits: Logits) -> None:
        """Classify one batch of last iterates in a forward pass; samples with starts left begin again."""
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
        """Move iterates along the gradient, and queue them for the next step or the final classification."""
        moved = self.ball.project(self.ball.ascend(batch.adversarial, gradient, self.step_size), batch.images)
        batch = replace(batch, adversarial=moved, step=batch.step + 1)
        arrived = batch.step >= self.steps
        last = batch[arrived]
        last = replace(last, adversarial=self.ball.finish(last.adversarial))
        self._arrived = last if self._arrived is None else ActiveSamples.joined(self._arrived, last)
        self._move(batch[~arrived])

    def _move(self, batch: ActiveSamples) -> None:
        """Put samples at the front of the queue: finishing those that began first keeps the queue short."""
        self._moving = batch if self._moving is None else ActiveSamples.joined(batch, self._moving)

    def _started(self, batch: ActiveSamples) -> ActiveSamples:
        """Return samples at the random starts of their ``restart`` numbers, ordered by these."""
        assert self.restart is not None  # noqa: S101
        starts = []
        for number in torch.unique(batch.restart):
            part = batch[batch.restart == number]
            starts.append(self.restart(part.images, part.indices, int(number)))
        order = torch.argsort(batch.restart, stable=True)
        return replace(batch[order], adversarial=torch.cat(starts) if starts else batch.adversarial)

    def _end(self, batch: ActiveSamples, scores: Tensor, done: Tensor) -> None:
        """Pass the samples that are done to ``ended``, with the logits of their iterates."""
        ended = batch[done]
        self.ended(FinishedSamples(ended.images, ended.adversarial, ended.labels, ended.indices, scores[done]))
