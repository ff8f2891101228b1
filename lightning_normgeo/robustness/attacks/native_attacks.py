"""Attacks of this package within a ball: BIM, PGD, APGD and the square attack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.attacks.attack import Attack, AttackBatch
from lightning_normgeo.robustness.attacks.search.auto_pgd import AutoSteps
from lightning_normgeo.robustness.attacks.search.ball import Ball, Norm
from lightning_normgeo.robustness.attacks.search.losses import Loss
from lightning_normgeo.robustness.attacks.search.projected_gradient import projected_gradient
from lightning_normgeo.robustness.attacks.search.rules import FixedSteps, Preceded, RandomPoints, RandomStart, Rule
from lightning_normgeo.robustness.attacks.search.square import SquareSteps


@dataclass(frozen=True, kw_only=True)
class BallAttack(Attack):
    """An attack within a ball, step by step.

    Attributes:
        norm: norm of the ball, ``linf`` or ``l2``.
        eps: radius of the ball, in units of the threat model's space.
        times_sqrt_d: whether to multiply ``eps`` and step sizes by √d, with d values per image.
        loss: name of the loss to maximize, see :data:`.LOSSES`.
        targets: number of classes to aim at, each with starts of its own; 0 for none.
        restarts: number of starts; a sample is robust only if it withstands all.
        eot: passes of a random model over which each gradient is averaged.
        bisections: bisections of the radius, to find the smallest one of each sample; 0 to attack at one radius.
    """

    norm: Norm
    eps: float
    times_sqrt_d: bool = False
    loss: str = "cross_entropy"
    targets: int = 0
    restarts: int = 1
    eot: int = 1
    bisections: int = 0

    @property
    def part(self) -> str:
        """The kind of detail that the row is: also a search for the smallest ``radius``."""
        return super().part or ("radius" if self.bisections else "")

    @property
    def objective(self) -> Loss:
        """The loss to maximize."""
        return Loss(self.loss, self.targets)

    @property
    def needs_gradient(self) -> bool:
        """Whether the attack needs the gradient with respect to the images."""
        return True

    @property
    def takes_any(self) -> bool:
        """Whether the first misclassified point counts, whatever the setting ``semantics``."""
        return True

    @property
    def begins_with_gradient(self) -> bool:
        """Whether the first step is along the gradient of the cross entropy at the image."""
        return False

    def scale(self, values: int) -> float:
        """Return the factor of the radius and the step size for images with this number of values."""
        return values**0.5 if self.times_sqrt_d else 1.0

    def ball(self, batch: AttackBatch) -> Ball:
        """Return the ball for the images of a batch."""
        eps = self.eps * self.scale(batch.images[0].numel())
        return Ball(self.norm, eps, *batch.box, batch.threat.box_first, batch.representable)

    def rule(self, batch: AttackBatch) -> Rule:
        """Return the rule by which samples move."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the result, as plain values."""
        settings = super().settings()
        defaults = {"targets": 0, "eot": 1, "bisections": 0}
        return {key: value for key, value in settings.items() if defaults.get(key) != value}


@dataclass(frozen=True, kw_only=True)
class ProjectedGradient(BallAttack):
    """BIM or PGD.

    Attributes:
        step_size: step size of one iteration, in the units of ``eps``.
        steps: number of iterations.
        random_start: whether to start at a random point of the ball (PGD) instead of the image (BIM).
    """

    step_size: float
    steps: int
    random_start: bool

    @property
    def takes_any(self) -> bool:
        """Whether the first misclassified point counts, whatever the setting ``semantics``."""
        return self.bisections > 0

    @property
    def begins_with_gradient(self) -> bool:
        """Whether the first step is along the gradient of the cross entropy at the image."""
        return not self.random_start and self.objective == Loss() and self.eot == 1

    def rule(self, batch: AttackBatch) -> FixedSteps:
        """Return the rule by which samples move."""
        step_size = self.step_size * self.scale(batch.images[0].numel())
        start = RandomStart(batch.seed) if self.random_start else None
        return FixedSteps(self.ball(batch), self.objective, self.steps, self.restarts, step_size, start)

    def perturb(self, batch: AttackBatch, restart: int = 0) -> Tensor:
        """Return the last iterates of the start number ``restart``."""
        rule = self.rule(batch)
        start = rule.ball.sample(batch.images, batch.seed, batch.indices, restart) if self.random_start else None
        targets = None
        if self.targets:
            assert batch.clean is not None  # noqa: S101
            targets = rule.loss.target_of(batch.clean, batch.labels, torch.full_like(batch.labels, restart))
        gradient = batch.gradient if self.begins_with_gradient else None
        return projected_gradient(
            batch.logits, batch.images, batch.labels, rule.ball, rule.step_size, self.steps, start, gradient,
            rule.loss, targets, self.eot,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AutoPGD(BallAttack):
    """APGD, see :class:`.AutoSteps`, after a first start of BIM with the same loss.

    Attributes:
        steps: number of steps of each start.
        bim_steps: number of steps of the first start, of BIM, without which APGD can be weaker than BIM; 0 for none, as
            published.
        bim_step_size: step size of BIM, in the units of ``eps``.
    """

    steps: int
    bim_steps: int = 0
    bim_step_size: float = 0.0

    def rule(self, batch: AttackBatch) -> Rule:
        """Return the rule by which samples move."""
        ball, start = self.ball(batch), RandomStart(batch.seed, surface=True)
        rule = AutoSteps(ball, self.objective, self.steps, self.restarts, start)
        if not self.bim_steps:
            return rule
        size = self.bim_step_size * self.scale(batch.images[0].numel())
        return Preceded(FixedSteps(ball, self.objective, self.bim_steps, 1, size, None), rule)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the result, as plain values."""
        settings = super().settings()
        return settings if self.bim_steps else {k: v for k, v in settings.items() if not k.startswith("bim_")}


@dataclass(frozen=True, kw_only=True)
class RandomSearch(BallAttack):
    """Random points of the ball.

    Attributes:
        points: number of points.
    """

    points: int

    @property
    def needs_gradient(self) -> bool:
        """Whether the attack needs the gradient with respect to the images."""
        return False

    def rule(self, batch: AttackBatch) -> RandomPoints:
        """Return the rule by which samples move."""
        return RandomPoints(self.ball(batch), self.objective, self.points - 1, 1, RandomStart(batch.seed))


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """BIM on another model, the surrogate, whose last iterates are given to the model itself.

    Attributes:
        source: the attack on the surrogate.
    """

    source: ProjectedGradient

    @property
    def eps(self) -> float:
        """Radius of the ball."""
        return self.source.eps

    @property
    def norm(self) -> Norm:
        """Norm of the ball."""
        return self.source.norm

    def perturb(self, batch: AttackBatch) -> Tensor:
        """Return the last iterates of the attack on the surrogate.

        Raises:
            UnsuitableError: without a surrogate.
        """
        if batch.surrogate is None:
            raise UnsuitableError("There is no surrogate to transfer attacks from. Give surrogate=….")
        with torch.no_grad():
            clean = batch.surrogate(batch.images)
        return self.source.perturb(replace(batch, logits=batch.surrogate, gradient=None, clean=clean))

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the result, as plain values."""
        settings = {key: value for key, value in super().settings().items() if key != "source"}
        return {**settings, **self.source.settings()}


@dataclass(frozen=True, kw_only=True)
class SquareSearch(BallAttack):
    """The square attack, see :class:`.SquareSteps`.

    Attributes:
        queries: number of queries of each start.
        share: share of pixels in the first squares.
    """

    queries: int
    share: float

    @property
    def needs_gradient(self) -> bool:
        """Whether the attack needs the gradient with respect to the images."""
        return False

    def rule(self, batch: AttackBatch) -> SquareSteps:
        """Return the rule by which samples move."""
        return SquareSteps(self.ball(batch), self.objective, self.queries, self.restarts, batch.seed, self.share)
