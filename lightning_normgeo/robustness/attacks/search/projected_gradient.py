"""Projected gradient ascent in l∞ and l2 balls (BIM, PGD) as pure functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.search.ball import Ball
from lightning_normgeo.robustness.attacks.search.losses import CROSS_ENTROPY, Loss, at_least_float32

Logits = Callable[[Tensor], Tensor]


def projected_gradient(
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
    gradient: Tensor | None = None,
    loss: Loss = CROSS_ENTROPY,
    targets: Tensor | None = None,
    draws: int = 1,
) -> Tensor:
    r"""Return the last iterate of untargeted projected gradient ascent.

    .. math:: x_{k+1} = \Pi\bigl(x_k + \alpha\, d(\nabla_x L(f(x_k), y))\bigr), \quad
              d(g) = \mathrm{sign}\, g \;(l_\infty) \text{ or } g / \lVert g\rVert_2 \;(l_2)

    Started at the image this is the basic iterative method (BIM, Kurakin et al. 2017), from a random point PGD
    (Madry et al. 2018). Gradients are taken with respect to the images alone: no parameter's ``.grad`` is touched.

    Args:
        logits: maps images to class logits ``(batch, classes)``, without changing any state.
        images: ``(batch, channels, …)``.
        labels: ``(batch,)`` class indices.
        ball: the set that Π projects onto.
        step_size: α, in units of ``images``.
        steps: number of iterations.
        start: the first iterate x₀. Default: ``images``.
        gradient: gradient of the loss at the start, if it is known already. Default: it is computed.
        loss: the loss to maximize. Default: cross entropy.
        targets: ``(batch,)`` class indices that a loss with targets aims at.
        draws: passes of a random model over which each gradient is averaged.

    Returns:
        Images within the ball and the box, of the shape of ``images``.

    Cost: ``steps`` forward passes and backward passes to the input, one less if ``gradient`` is given.
    """
    images = images.detach()
    adversarial = images.clone() if start is None else start.detach()
    for step in range(steps):
        if step > 0 or gradient is None:
            _, _, gradient = ascent(logits, adversarial, labels, loss, targets, draws)
        with torch.no_grad():
            adversarial = ball.project(ball.ascend(adversarial, gradient, step_size), images)
    return ball.finish(adversarial)


def bim_linf(
    logits: Logits, images: Tensor, labels: Tensor, eps: float, step_size: float, steps: int, lower: float, upper: float
) -> Tensor:
    """Return adversarial images of the basic iterative method (BIM) in l∞; see :func:`projected_gradient`.

    Args:
        logits: maps images to class logits ``(batch, classes)``, without changing any state.
        images: ``(batch, channels, …)``.
        labels: ``(batch,)`` class indices.
        eps: radius of the l∞ ball, in units of ``images``.
        step_size: step size, in units of ``images``.
        steps: number of iterations.
        lower: smallest allowed value.
        upper: largest allowed value.

    Cost: ``steps`` forward passes and backward passes to the input.
    """
    return projected_gradient(logits, images, labels, Ball("linf", eps, lower, upper), step_size, steps)


def ascent(
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    loss: Loss = CROSS_ENTROPY,
    targets: Tensor | None = None,
    draws: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits, the loss of each image, and its gradient with respect to that image.

    Of a random model the loss and its gradient are means over ``draws`` passes, the expectation over transformation of
    Athalye et al. 2018; the logits are those of the last pass.

    Cost: ``draws`` forward passes and backward passes to the input.
    """
    labels = labels.clone()  # labels may be inference tensors, which autograd cannot save
    total_loss, total_gradient, scores = None, None, images
    for _ in range(draws):
        with torch.enable_grad():
            inside = images.detach().clone().requires_grad_(True)
            scores = at_least_float32(logits(inside))
            losses = loss(scores, labels, targets)
            # the sum instead of the mean, so that a sample's gradient does not depend on the size of the batch
            (gradient,) = torch.autograd.grad(losses.sum(), inside)
        total_loss = losses.detach() if total_loss is None else total_loss + losses.detach()
        total_gradient = gradient if total_gradient is None else total_gradient + gradient
    assert total_loss is not None and total_gradient is not None  # noqa: S101, PT018
    return scores.detach(), total_loss / draws, total_gradient / draws
