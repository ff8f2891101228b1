"""Attacks in which any point counts: a sample is attacked only until it is misclassified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.attacks.attack import AttackBatch
from lightning_normgeo.robustness.attacks.native_attacks import BallAttack
from lightning_normgeo.robustness.attacks.search.losses import at_least_float32, margin, predicted
from lightning_normgeo.robustness.attacks.search.projected_gradient import Logits, ascent
from lightning_normgeo.robustness.attacks.search.rules import ActiveSamples, Rule
from lightning_normgeo.robustness.attacks.search.smallest_radius import SmallestRadius


class FinishedSamples(NamedTuple):
    """Samples whose attack has ended, at the first misclassified point or at the last one, with its logits.

    ``closest`` is the largest margin max_{j≠y} z_j − z_y over all points, where the set has a judge; ``checked`` says
    whether and why the attack was repeated, see :mod:`.verified_decisions`.
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    indices: Tensor
    scores: Tensor
    clean: Tensor
    closest: Tensor | None = None
    checked: Tensor | None = None

    def at(self, which: Tensor) -> FinishedSamples:
        """Return the samples of a mask."""
        closest, checked = (None if tensor is None else tensor[which] for tensor in (self.closest, self.checked))
        images, adversarial, labels, indices, scores, clean = (tensor[which] for tensor in self[:6])
        return FinishedSamples(images, adversarial, labels, indices, scores, clean, closest, checked)


def any_point(attack: BallAttack, batch: AttackBatch, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's first misclassified point over all starts, else its last one, and the logits of these.

    For models whose logits depend on the whole batch: all samples take part in every pass.

    Args:
        attack: the attack.
        batch: a batch of the loader.
        scores: logits of the clean images, which count as the first point.

    Raises:
        UnsuitableError: for an attack that looks for the smallest radius of each sample by itself.
    """
    if attack.bisections:
        raise UnsuitableError("Its smallest radius is found for single images, whose logits depend on no others.")
    rule = attack.rule(batch)
    found, found_scores = batch.images.clone(), scores.clone()
    correct = predicted(scores) == batch.labels  # at every point so far
    indices = torch.tensor(batch.indices, dtype=torch.long, device=batch.labels.device)
    samples = ActiveSamples.fresh(batch.images, batch.labels, indices, scores)
    for number in range(rule.starts(scores.shape[1])):
        samples = rule.begin(replace(samples, restart=torch.full_like(batch.labels, number)))
        while True:
            last = bool(rule.arrived(samples).all())
            here = samples.adversarial
            point, losses, gradient = _evaluated(rule, samples, batch.logits, attack.eot, moves=not last)
            found[correct], found_scores[correct] = here[correct], point[correct]
            correct = correct & (predicted(point) == batch.labels)
            if not bool(correct.any()):
                return found, found_scores
            if last:
                break
            samples = rule.move(samples, losses, gradient)
    return found, found_scores


def _evaluated(
    rule: Rule, samples: ActiveSamples, logits: Logits, draws: int, moves: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the logits and losses at the points of samples, with the gradient if the rule moves them by it."""
    if rule.needs_gradient and moves:
        return ascent(logits, samples.adversarial, samples.labels, rule.loss, rule.targets(samples), draws)
    with torch.no_grad():
        scores = at_least_float32(logits(samples.adversarial))
    return scores, rule.losses(samples, scores), None


def _noted(samples: ActiveSamples, scores: Tensor) -> ActiveSamples:
    """Return samples with the largest margin over all points so far."""
    closest = torch.maximum(samples.bounds["closest"], margin(scores, samples.labels))
    return replace(samples, bounds={**samples.bounds, "closest": closest})


class ActiveSet:
    """Runs one attack on a stream of samples, in batches that are filled up when samples have finished.

    A sample is finished at its first misclassified point (the clean image is one), or after the last point of the last
    start. Except for rounding, its result does not depend on the other samples.

    Args:
        rule: the rule by which samples move.
        batch_size: samples per pass.
        ended: is called with the finished samples.
        draws: passes of a random model over which each gradient is averaged.
        bisections: bisections of the radius, to find the smallest one of each sample; 0 to attack at one radius.
        judge: logits that decide whether a point is misclassified, where the attack follows others, less exact ones.
            They classify the points that those call misclassified, and the last ones. Default: those of :meth:`run`.

    Attributes:
        passes: number of samples that went through a forward and backward pass; a forward pass alone counts a third.
    """

    def __init__(
        self,
        rule: Rule,
        batch_size: int,
        ended: Callable[[FinishedSamples], None],
        draws: int = 1,
        bisections: int = 0,
        judge: Logits | None = None,
    ) -> None:
        self.rule, self.batch_size, self.ended, self.draws = rule, batch_size, ended, draws
        self.judge = judge
        self.search = SmallestRadius(bisections) if bisections else None
        self.passes = 0.0
        self._moving: ActiveSamples | None = None
        self._arrived: ActiveSamples | None = None

    def put(
        self, images: Tensor, labels: Tensor, indices: Tensor, scores: Tensor, gradient: Tensor | None = None
    ) -> None:
        """Add samples to be attacked.

        Args:
            images: ``(batch, channels, …)`` in the threat model's space.
            labels: class indices.
            indices: a number for each sample, which seeds its random numbers.
            scores: logits of ``images``.
            gradient: gradient of the loss at ``images``, if it is known and the attack begins there.
        """
        broken = predicted(scores) != labels  # misclassified without any attack
        self.ended(FinishedSamples(*(t[broken] for t in (images, images, labels, indices, scores, scores))))
        stands = ~broken
        fresh = ActiveSamples.fresh(*(t[stands] for t in (images, labels, indices, scores)))
        fresh = fresh if self.search is None else self.search.begun(fresh)
        if self.judge is not None:
            fresh = replace(fresh, bounds={**fresh.bounds, "closest": margin(fresh.clean, fresh.labels)})
        fresh = self.rule.begin(fresh)
        if gradient is None:
            self._move(fresh)
        elif len(fresh):
            self._step(fresh, torch.zeros_like(fresh.clean[:, 0]), gradient[stands])

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
        """Make one step: a pass of one batch of points, with its gradient if the rule needs it."""
        assert self._moving is not None  # noqa: S101
        batch, self._moving = self._moving[: self.batch_size], self._moving[self.batch_size :]
        scores, losses, gradient = _evaluated(self.rule, batch, logits, self.draws)
        self.passes += len(batch) * (1 if self.rule.needs_gradient else 1 / 3)
        if self.judge is not None:
            scores = self._confirmed(batch, scores)
            batch = _noted(batch, scores)
        broken = predicted(scores) != batch.labels
        self._end(batch, scores, broken)
        if not bool(broken.all()):
            self._step(batch[~broken], losses[~broken], None if gradient is None else gradient[~broken])

    def _judge(self, logits: Logits) -> None:
        """Classify one batch of last points in a forward pass; samples with starts left begin again."""
        assert self._arrived is not None  # noqa: S101
        batch, self._arrived = self._arrived[: self.batch_size], self._arrived[self.batch_size :]
        scores = self._classified(batch.adversarial, self.judge or logits)
        if self.judge is not None:
            batch = _noted(batch, scores)
        last = batch.restart + 1 >= self.rule.starts(scores.shape[1])
        done = (predicted(scores) != batch.labels) | last
        self._end(batch, scores, done)
        again = batch[~done]
        if len(again):
            self._move(self.rule.begin(replace(again, restart=again.restart + 1)))

    def _confirmed(self, batch: ActiveSamples, scores: Tensor) -> Tensor:
        """Return the logits, with those of the judge for points that are misclassified."""
        assert self.judge is not None  # noqa: S101
        broken = predicted(scores) != batch.labels
        if not bool(broken.any()):
            return scores
        scores = scores.clone()
        scores[broken] = self._classified(batch.adversarial[broken], self.judge).to(scores.dtype)
        return scores

    def _classified(self, images: Tensor, logits: Logits) -> Tensor:
        with torch.no_grad():
            scores = at_least_float32(logits(images))
        self.passes += len(images) / 3
        return scores

    def _step(self, batch: ActiveSamples, losses: Tensor, gradient: Tensor | None) -> None:
        """Move samples by the rule, and queue them for the next step or the final classification."""
        with torch.no_grad():
            batch = self.rule.move(batch, losses, gradient)
        arrived = self.rule.arrived(batch)
        last = batch[arrived]
        self._arrived = last if self._arrived is None else ActiveSamples.joined(self._arrived, last)
        self._move(batch[~arrived])

    def _move(self, batch: ActiveSamples) -> None:
        """Put samples at the front of the queue: finishing those that began first keeps the queue short."""
        self._moving = batch if self._moving is None else ActiveSamples.joined(batch, self._moving)

    def _end(self, batch: ActiveSamples, scores: Tensor, done: Tensor) -> None:
        """Pass the samples that are done to ``ended``, or begin anew at a smaller radius."""
        ended, scores = batch[done], scores[done]
        if self.search is not None and len(ended):
            ended, scores, again = self.search.narrowed(ended, scores)
            if len(again):
                self._move(self.rule.begin(again))
        points = ended.images, ended.adversarial, ended.labels, ended.indices
        self.ended(FinishedSamples(*points, scores, ended.clean, ended.bounds.get("closest")))
