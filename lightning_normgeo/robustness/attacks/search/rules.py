"""Rules by which attacks move samples: what a start is, and what the next point is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.search.ball import Ball, per_image
from lightning_normgeo.robustness.attacks.search.losses import Loss


@dataclass(frozen=True)
class ActiveSamples:
    """Samples under attack, with one entry per sample in every tensor.

    Attributes:
        images: the original images, in the threat model's space.
        adversarial: the current points.
        labels: class indices.
        indices: a number for each sample, which seeds its random numbers.
        step: number of steps from the start to the point.
        restart: number of the current start, from 0.
        clean: logits of the originals, which decide what targeted losses aim at.
        state: what else the rule has to remember of a sample.
        bounds: bounds of the smallest radius, if that is looked for, see :class:`.SmallestRadius`; with ``scale``, the
            radius of the sample over that of the ball.
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    indices: Tensor
    step: Tensor
    restart: Tensor
    clean: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    bounds: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, which: Tensor | slice) -> ActiveSamples:
        """Return a part of the samples."""
        state, bounds = ({name: tensor[which] for name, tensor in part.items()} for part in (self.state, self.bounds))
        tensors = {name: tensor[which] for name, tensor in self.tensors.items()}
        return ActiveSamples(**tensors, state=state, bounds=bounds)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.labels.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are attributes themselves, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @staticmethod
    def joined(*parts: ActiveSamples) -> ActiveSamples:
        """Return the samples of all parts as one object."""
        parts = tuple(part for part in parts if len(part)) or parts[:1]

        def joined(entries: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}

        state, bounds = joined([part.state for part in parts]), joined([part.bounds for part in parts])
        return ActiveSamples(**joined([part.tensors for part in parts]), state=state, bounds=bounds)

    @staticmethod
    def fresh(images: Tensor, labels: Tensor, indices: Tensor, clean: Tensor) -> ActiveSamples:
        """Return samples that have not moved yet."""
        zero = torch.zeros_like(labels)
        return ActiveSamples(images, images, labels, indices, zero, zero, clean)


class Rule:
    """A rule by which an attack moves samples.

    Attributes:
        ball: the set of allowed images around each original.
        loss: the loss to maximize.
        steps: number of steps from a start to its last point.
        restarts: number of starts, each of which is made for every target of the loss.
        needs_gradient: whether :meth:`move` takes the gradient of the loss.
    """

    needs_gradient = True

    def __init__(self, ball: Ball, loss: Loss, steps: int, restarts: int) -> None:
        self.ball, self.loss, self.steps, self.restarts = ball, loss, steps, restarts

    def starts(self, classes: int) -> int:
        """Return the number of starts for a model with so many classes."""
        return self.loss.starts(self.restarts, classes)

    def begin(self, samples: ActiveSamples) -> ActiveSamples:
        """Return samples at the first points of the starts with the numbers ``samples.restart``."""
        raise NotImplementedError

    def move(self, samples: ActiveSamples, losses: Tensor, gradient: Tensor | None) -> ActiveSamples:
        """Return samples after one step.

        Args:
            samples: at the points where the loss was computed.
            losses: ``(batch,)``.
            gradient: gradient of the loss; None if :attr:`needs_gradient` is False.
        """
        raise NotImplementedError

    def ball_of(self, samples: ActiveSamples) -> Ball:
        """Return the ball, with a radius for each sample if they differ."""
        scale = samples.bounds.get("scale")
        return self.ball if scale is None else replace(self.ball, eps=self.ball.eps * per_image(scale, samples.images))

    def arrived(self, samples: ActiveSamples) -> Tensor:
        """Return a mask of the samples at the last points of their starts."""
        return samples.step >= self.steps

    def stepped(self, samples: ActiveSamples, moved: Tensor) -> ActiveSamples:
        """Return samples one step further at other points, of which the last ones of a start are put into the box."""
        last = per_image(samples.step + 1 >= self.steps, moved)
        moved = torch.where(last, self.ball.finish(moved), moved)
        return replace(samples, adversarial=moved, step=samples.step + 1)

    def targets(self, samples: ActiveSamples) -> Tensor | None:
        """Return the classes that the starts of the samples aim at; None for a loss without targets."""
        return self.loss.target_of(samples.clean, samples.labels, samples.restart) if self.loss.targets else None

    def losses(self, samples: ActiveSamples, scores: Tensor) -> Tensor:
        """Return the loss of each sample for the logits of its point."""
        return self.loss(scores, samples.labels, self.targets(samples))


class RandomStart(NamedTuple):
    """Random starts of an evaluation.

    Attributes:
        seed: seed of the evaluation.
        surface: whether starts are as far away as the ball allows, as in APGD.
    """

    seed: int
    surface: bool = False

    def __call__(self, rule: Rule, samples: ActiveSamples) -> Tensor:
        """Return a random point of the ball for each sample, which depends on its index and the number of its start."""
        ball = rule.ball_of(samples)
        return ball.sample(samples.images, self.seed, samples.indices, samples.restart, self.surface)


class FixedSteps(Rule):
    """Steps of one length (BIM, PGD), see :func:`.projected_gradient`."""

    def __init__(
        self,
        ball: Ball,
        loss: Loss,
        steps: int,
        restarts: int,
        step_size: float,
        start: RandomStart | None,
    ) -> None:
        super().__init__(ball, loss, steps, restarts)
        self.step_size, self.start = step_size, start

    def begin(self, samples: ActiveSamples) -> ActiveSamples:
        """Return samples at their random starts, or at the images."""
        points = samples.images if self.start is None else self.start(self, samples)
        return replace(samples, adversarial=points, step=torch.zeros_like(samples.step))

    def move(self, samples: ActiveSamples, losses: Tensor, gradient: Tensor | None) -> ActiveSamples:
        """Return samples after one step along the gradient."""
        assert gradient is not None  # noqa: S101
        ball, scale = self.ball_of(samples), samples.bounds.get("scale")
        size = self.step_size if scale is None else self.step_size * per_image(scale, samples.images)
        return self.stepped(samples, ball.project(ball.ascend(samples.adversarial, gradient, size), samples.images))


class RandomPoints(Rule):
    """Random points of the ball, one after another; no gradient is used."""

    needs_gradient = False

    def __init__(self, ball: Ball, loss: Loss, steps: int, restarts: int, start: RandomStart) -> None:
        super().__init__(ball, loss, steps, restarts)
        self.start = start

    def begin(self, samples: ActiveSamples) -> ActiveSamples:
        """Return samples at their first random points."""
        begun = replace(samples, step=torch.zeros_like(samples.step))
        return replace(begun, adversarial=self.start(self, begun))

    def move(self, samples: ActiveSamples, losses: Tensor, gradient: Tensor | None) -> ActiveSamples:
        """Return samples at their next random points."""
        step = samples.step + 1
        drawn = replace(samples, restart=samples.restart * (self.steps + 1) + step)
        return replace(samples, adversarial=self.start(self, drawn), step=step)


class Preceded(Rule):
    """A rule with one start by another rule before its own, with the same loss, so that it is never the weaker one.

    Args:
        first: the rule of the first start.
        main: the rule of all further starts.
    """

    def __init__(self, first: Rule, main: Rule) -> None:
        super().__init__(main.ball, main.loss, max(first.steps, main.steps), main.restarts)
        self.first, self.main = first, main

    def starts(self, classes: int) -> int:
        """Return the number of starts for a model with so many classes."""
        return 1 + self.main.starts(classes)

    def begin(self, samples: ActiveSamples) -> ActiveSamples:
        """Return samples at the first points of their starts."""
        begun = self.main.begin(replace(samples, restart=(samples.restart - 1).clamp_min(0)))
        early = self.first.begin(samples)
        is_first = per_image(samples.restart == 0, samples.images)
        return replace(
            begun, restart=samples.restart, adversarial=torch.where(is_first, early.adversarial, begun.adversarial)
        )

    def move(self, samples: ActiveSamples, losses: Tensor, gradient: Tensor | None) -> ActiveSamples:
        """Return samples after one step, those of the first start before the others."""
        is_first = samples.restart == 0
        if bool(is_first.all()):
            return self.first.move(samples, losses, gradient)
        if not bool(is_first.any()):
            return self.main.move(samples, losses, gradient)
        parts = []
        for rule, part in ((self.first, is_first), (self.main, ~is_first)):
            parts.append(rule.move(samples[part], losses[part], None if gradient is None else gradient[part]))
        return ActiveSamples.joined(*parts)

    def arrived(self, samples: ActiveSamples) -> Tensor:
        """Return a mask of the samples at the last points of their starts."""
        last = torch.where(samples.restart == 0, self.first.steps, self.main.steps)
        return samples.step >= last
