"""Auto-PGD: projected gradient ascent that controls its own step size (Croce and Hein 2020, arXiv 2003.01690)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.search.ball import Ball, per_image
from lightning_normgeo.robustness.attacks.search.losses import Loss
from lightning_normgeo.robustness.attacks.search.rules import ActiveSamples, RandomStart, Rule

_MOMENTUM = 0.75
"""Share of the new direction in a step; the rest goes on along the last one."""
_RISES = 0.75
"""Share ρ of the steps between two checkpoints that have to raise the loss, else the step size is halved."""


def checkpoints(steps: int) -> dict[int, int]:
    """Return the steps after which the step size is checked, each with the number of steps since the last check.

    The first check comes after 22 % of the steps; each further one 3 % of them earlier than the one before, but after
    at least 6 %.
    """
    found, at = {}, 0
    window, least, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    while at + window <= steps:
        at += window
        found[at] = window
        window = max(window - shorter, least)
    return found


class AutoSteps(Rule):
    r"""Steps of APGD.

    .. math:: z = \Pi(x_k + \eta_k d(\nabla)), \quad x_{k+1} = \Pi(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))

    The step size begins at 2ε. At a checkpoint it is halved, and the sample goes back to its best point, if fewer than
    75 % of the steps raised the loss, or if neither the best loss nor the step size have changed since the last check.

    Args:
        ball: the set of allowed images.
        loss: the loss to maximize.
        steps: number of steps.
        restarts: number of starts.
        start: random starts.
    """

    def __init__(self, ball: Ball, loss: Loss, steps: int, restarts: int, start: RandomStart) -> None:
        super().__init__(ball, loss, steps, restarts)
        self.start = start
        windows = checkpoints(steps)
        self._windows = torch.tensor([windows.get(step, 0) for step in range(steps + 1)])

    def begin(self, samples: ActiveSamples) -> ActiveSamples:
        """Return samples at random points of the surface of the ball."""
        points = self.start(self, samples)
        low = torch.full(samples.labels.shape, -torch.inf, dtype=points.dtype, device=points.device)
        zero = torch.zeros_like(low)
        state = {
            "previous": points,
            "best": points,
            "best_gradient": torch.zeros_like(points),
            "best_loss": low,
            "last_loss": low,
            "checked_loss": low,
            "rises": zero,
            "halved": torch.ones_like(zero),
            "step_size": 2 * self.ball.eps * samples.bounds.get("scale", torch.ones_like(zero)),
        }
        return replace(samples, adversarial=points, step=torch.zeros_like(samples.step), state=state)

    def move(self, samples: ActiveSamples, losses: Tensor, gradient: Tensor | None) -> ActiveSamples:
        """Return samples after one step, from the best point where the step size was halved."""
        assert gradient is not None  # noqa: S101
        samples, gradient = self._checked(self._noted(samples, losses.to(gradient.dtype), gradient), gradient)
        state, here, ball = samples.state, samples.adversarial, self.ball_of(samples)
        first = samples.step == 0
        share = per_image(torch.where(first, 1.0, _MOMENTUM).to(here.dtype), here)
        ahead = ball.project(ball.ascend(here, gradient, per_image(state["step_size"], here)), samples.images)
        moved = here + share * (ahead - here) + (1 - share) * (here - state["previous"])
        samples = replace(samples, state={**state, "previous": here})
        return self.stepped(samples, ball.project(moved, samples.images))

    def _noted(self, samples: ActiveSamples, losses: Tensor, gradient: Tensor) -> ActiveSamples:
        """Return samples with their best points, and with the numbers of steps that raised the loss."""
        state, first = samples.state, samples.step == 0
        better = losses > state["best_loss"]
        wide = per_image(better, gradient)
        return replace(
            samples,
            state={
                **state,
                "best": torch.where(wide, samples.adversarial, state["best"]),
                "best_gradient": torch.where(wide, gradient, state["best_gradient"]),
                "best_loss": torch.where(better, losses, state["best_loss"]),
                "checked_loss": torch.where(first, losses, state["checked_loss"]),
                "rises": state["rises"] + ((losses > state["last_loss"]) & ~first),
                "last_loss": losses,
            },
        )

    def _checked(self, samples: ActiveSamples, gradient: Tensor) -> tuple[ActiveSamples, Tensor]:
        """Return samples, and their gradients, with the step size halved where it has to be."""
        state = samples.state
        window = self._windows.to(samples.step.device)[samples.step]
        due = window > 0
        few = state["rises"] <= _RISES * window
        stuck = (state["halved"] == 0) & (state["checked_loss"] >= state["best_loss"])
        halved = due & (few | stuck)
        wide = per_image(halved, gradient)
        checked = {
            **state,
            "halved": torch.where(due, halved.to(state["halved"].dtype), state["halved"]),
            "checked_loss": torch.where(due, state["best_loss"], state["checked_loss"]),
            "rises": torch.where(due, 0.0, state["rises"]),
            "step_size": torch.where(halved, state["step_size"] / 2, state["step_size"]),
        }
        here = torch.where(wide, state["best"], samples.adversarial)
        return (
            replace(samples, adversarial=here, state=checked),
            torch.where(wide, state["best_gradient"], gradient),
        )
