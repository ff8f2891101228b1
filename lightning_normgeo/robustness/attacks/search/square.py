"""Square attack: random search with squares that get smaller (Andriushchenko et al. 2020, arXiv 1912.00049), in l∞."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.attacks.random_numbers.counter_random import uniforms
from lightning_normgeo.robustness.attacks.search.ball import Ball, per_image
from lightning_normgeo.robustness.attacks.search.losses import Loss
from lightning_normgeo.robustness.attacks.search.rules import ActiveSamples, Rule

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries out of 10,000 after which the share of changed pixels is halved."""
_AHEAD = 64
"""Steps whose random numbers are drawn together."""


class SquareSteps(Rule):
    """Steps of the square attack on images ``(channels, height, width)``, in l∞.

    It begins with vertical stripes. In each step a square of pixels is moved by ±2ε in every channel, and projected
    onto the ball; the change stays if it raises the loss. The share of pixels in a square begins at ``share``, and is
    halved nine times, after fixed parts of the queries. No gradient is used.

    Args:
        ball: the set of allowed images, in l∞.
        loss: the loss to maximize.
        steps: number of queries after the first.
        restarts: number of starts.
        seed: seed of the evaluation.
        share: share of pixels in the first squares, in (0, 1].
    """

    needs_gradient = False

    def __init__(self, ball: Ball, loss: Loss, steps: int, restarts: int, seed: int, share: float = 0.8) -> None:
        super().__init__(ball, loss, steps, restarts)
        self.seed, self.share = seed, share

    def begin(self, samples: ActiveSamples) -> ActiveSamples:
        """Return samples with vertical stripes."""
        if samples.images.ndim != 4:
            raise UnsuitableError(
                "The square attack needs images (channels, height, width), not inputs of shape "
                f"{tuple(samples.images.shape[1:])}."
            )
        channels, width = samples.images.shape[1], samples.images.shape[3]
        step = torch.zeros_like(samples.step)
        first = uniforms(self.seed, samples.indices, self._stream(samples.restart, step), channels * width)
        signs = self._signs(first).view(-1, channels, 1, width)
        ball = self.ball_of(samples)
        points = ball.project(samples.images + ball.eps * signs.to(samples.images), samples.images)
        low = torch.full(samples.labels.shape, -torch.inf, dtype=points.dtype, device=points.device)
        drawn = torch.zeros(len(low), _AHEAD, 2 + channels, device=points.device)
        state = {"best": points, "best_loss": low, "drawn": drawn}
        return replace(samples, adversarial=points, step=step, state=state)

    def move(self, samples: ActiveSamples, losses: Tensor, gradient: Tensor | None = None) -> ActiveSamples:
        """Return samples with one more square on the best points so far."""
        samples = self._drawn_ahead(samples)
        state = samples.state
        better = losses > state["best_loss"]
        best = torch.where(per_image(better, samples.adversarial), samples.adversarial, state["best"])
        changed = best + self._squares(samples).to(best)
        return replace(
            samples,
            adversarial=self.ball_of(samples).project(changed, samples.images),
            step=samples.step + 1,
            state={**state, "best": best, "best_loss": torch.where(better, losses.to(best.dtype), state["best_loss"])},
        )

    def side(self, step: Tensor, height: int, width: int) -> Tensor:
        """Return the side of the squares in pixels, at each of these steps."""
        query = (step * 10_000) // self.steps
        halvings = (query[:, None] > torch.tensor(_HALVINGS, device=query.device)).sum(1)
        side = (self.share * height * width / 2.0**halvings).sqrt().round().long()
        return side.clamp(1, min(height, width))

    def _squares(self, samples: ActiveSamples) -> Tensor:
        height, width = samples.images.shape[2:]
        drawn = samples.state["drawn"][torch.arange(len(samples), device=samples.step.device), samples.step % _AHEAD]
        side = self.side(samples.step, height, width)
        top, left = ((drawn[:, k] * (size - side)).long() for k, size in ((0, height), (1, width)))
        rows, columns = (
            (torch.arange(size, device=side.device) >= at[:, None])
            & (torch.arange(size, device=side.device) < (at + side)[:, None])
            for size, at in ((height, top), (width, left))
        )
        signs = self._signs(drawn[:, 2:])[:, :, None, None]
        return 2 * self.ball_of(samples).eps * signs * (rows[:, None, :, None] & columns[:, None, None, :])

    def _drawn_ahead(self, samples: ActiveSamples) -> ActiveSamples:
        """Return samples with the random numbers of their next steps, of many at once, which is faster."""
        due = samples.step % _AHEAD == 0
        if not bool(due.any()):
            return samples
        drawn = samples.state["drawn"].clone()
        ahead = torch.arange(1, _AHEAD + 1, device=samples.step.device)
        steps, starts = (samples.step[due][:, None] + ahead), samples.restart[due][:, None]
        indices = samples.indices[due][:, None].expand_as(steps)
        found = uniforms(self.seed, indices.flatten(), self._stream(starts, steps).flatten(), drawn.shape[2])
        drawn[due] = found.view(len(steps), _AHEAD, -1)
        return replace(samples, state={**samples.state, "drawn": drawn})

    def _stream(self, restart: Tensor, step: Tensor) -> Tensor:
        """Return the numbers of the draws of some steps of some starts."""
        return restart * (self.steps + 1) + step

    @staticmethod
    def _signs(drawn: Tensor) -> Tensor:
        return torch.where(drawn < 0.5, -1.0, 1.0)
