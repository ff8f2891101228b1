"""Perturbations as pure functions: projected gradient ascent in l∞ and l2 balls (BIM, PGD), and Gaussian noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Logits = Callable[[Tensor], Tensor]
Norm = Literal["linf", "l2"]
Bound = float | Tensor
"""A bound on image values: one number, or a tensor of one per channel that can be broadcast over images."""


@dataclass(frozen=True)
class Ball:
    r"""The set of allowed adversarial images: a ball :math:`\lVert x' - x\rVert \le \epsilon` intersected with a box.

    Attributes:
        norm: ``linf`` or ``l2``, over all elements of an image.
        eps: radius ε ≥ 0, in the units of the images.
        lower: lower bound of the box, in the units of the images.
        upper: upper bound of the box. If an original is outside the box, the box takes precedence over the ball.
        box_first: order of the two projections in l2. True: first onto the box, then onto the ball, and onto the box
            once more after the last step, as in advertorch. False: first onto the ball, then onto the box, as in
            torchattacks and foolbox.
        representable: rounds adversarial images, given the originals, to values that the model's precision can
            represent; None for no rounding.
    """

    norm: Norm
    eps: float
    lower: Bound
    upper: Bound
    box_first: bool = False
    representable: Callable[[Tensor, Tensor], Tensor] | None = None

    def ascend(self, images: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Return images after one step of ascent, along the sign of the gradient (l∞) or the unit gradient (l2).

        Elements of the gradient that are not finite count as zero.

        Args:
            images: ``(batch, channels, …)``.
            gradient: gradient of the loss with respect to ``images``.
            step_size: l∞ or l2 norm of the step.
        """
        gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.norm == "linf":
            return images + step_size * gradient.sign()
        # divided by the largest element first, since squares of small gradients underflow in float32
        scaled = gradient / per_image(gradient.abs().flatten(1).amax(1).clamp_min(_tiny(gradient)), gradient)
        return images + step_size * scaled / per_image(lengths(scaled).clamp_min(_tiny(gradient)), gradient)

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Return ``adversarial`` projected onto the ball around ``images`` and onto the box."""
        moved = self._projected(adversarial, images)
        return moved if self.representable is None else self.representable(moved, images)

    def finish(self, adversarial: Tensor) -> Tensor:
        """Return the last iterates, projected onto the box if ``box_first`` left them outside it."""
        return self._boxed(adversarial) if self.box_first and self.norm == "l2" else adversarial

    def _projected(self, adversarial: Tensor, images: Tensor) -> Tensor:
        if self.norm == "linf":
            return self._boxed(torch.minimum(torch.maximum(adversarial, images - self.eps), images + self.eps))
        if self.box_first:
            return self._shrunk(self._boxed(adversarial), images)
        return self._boxed(self._shrunk(adversarial, images))

    def _boxed(self, images: Tensor) -> Tensor:
        return images.clamp(self.lower, self.upper)  # type: ignore[arg-type]

    def _shrunk(self, adversarial: Tensor, images: Tensor) -> Tensor:
        perturbation = adversarial - images
        shrink = (self.eps / lengths(perturbation).clamp_min(_tiny(images))).clamp_max(1.0)
        return images + perturbation * per_image(shrink, images)

    def sample(self, images: Tensor, seed: int, indices: Sequence[int], restart: int = 0) -> Tensor:
        """Return random points of the ball, projected onto the box.

        They are uniform in l∞; in l2 they have a uniform direction and a uniform radius in [0, eps]. As with
        :func:`gaussian_noise`, a point depends only on ``seed``, the sample's index and ``restart``.

        Args:
            images: ``(batch, channels, …)``, the originals.
            seed: seed of the evaluation.
            indices: a number for each sample.
            restart: number of the start, from 0.
        """
        draws = [_draws(images.shape[1:], seed, int(i), 1 + restart, self.norm) for i in indices]
        offsets = torch.stack(draws).to(images.device, images.dtype) if draws else torch.zeros_like(images)
        return self.project(images + self.eps * offsets, images)


def projected_gradient(
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    r"""Return the last iterate of untargeted projected gradient ascent.

    .. math:: x_{k+1} = \Pi\bigl(x_k + \alpha\, d(\nabla_x \mathrm{CE}(f(x_k), y))\bigr), \quad
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

    Returns:
        Images within the ball and the box, of the shape of ``images``.

    Cost: ``steps`` forward passes and backward passes to the input, one less if ``gradient`` is given.
    """
    images = images.detach()
    adversarial = images.clone() if start is None else start.detach()
    for step in range(steps):
        if step > 0 or gradient is None:
            _, _, gradient = ascent(logits, adversarial, labels)
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


def ascent(logits: Logits, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits, the cross entropy of each image, and its gradient with respect to that image.

    Cost: one forward pass and one backward pass to the input.
    """
    labels = labels.clone()  # labels may be inference tensors, which autograd cannot save
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_(True)
        scores = at_least_float32(logits(images))
        losses = F.cross_entropy(scores, labels, reduction="none")
        # the sum instead of the mean, so that a sample's gradient does not depend on the size of the batch
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    return scores.detach(), losses.detach(), gradient


def gaussian_noise(
    images: Tensor, std: float, seed: int, indices: Sequence[int], bounds: tuple[Bound, Bound] | None = None
) -> Tensor:
    """Return images plus white Gaussian noise, with a separate random generator for each sample.

    The noise of a sample depends only on ``seed`` and its index, not on the batch size, the device, the number of
    processes or the global random state, which is neither read nor advanced.

    Args:
        images: ``(batch, …)``.
        std: standard deviation ≥ 0, in units of ``images``.
        seed: seed of the evaluation.
        indices: a number for each sample, e.g. its position in the data set.
        bounds: interval to which noisy images are clipped. Default: no clipping.

    Returns:
        Noisy images, of the shape of ``images``.

    Raises:
        ValueError: if the number of indices is not the number of images.
    """
    if len(indices) != len(images):
        raise ValueError(f"{len(images)} images need as many indices, got {len(indices)}.")
    if not len(images):
        return images
    noise = torch.stack([torch.randn(images.shape[1:], generator=_generator(seed, int(i))) for i in indices])
    noisy = images + std * noise.to(images.device, images.dtype)
    return noisy if bounds is None else noisy.clamp(*bounds)  # type: ignore[arg-type]


def lengths(perturbation: Tensor, norm: Norm = "l2") -> Tensor:
    """Return the norm of each image's perturbation, shape ``(batch,)``."""
    flat = perturbation.flatten(1)
    return torch.linalg.vector_norm(flat, 2 if norm == "l2" else float("inf"), dim=1)  # type: ignore[no-any-return]


def inward(values: Tensor, origin: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values`` rounded to a narrower dtype toward ``origin``.

    The distance from ``origin`` does not grow by this rounding, in any norm.

    Args:
        values: the numbers to round.
        origin: numbers of the same shape and dtype that the narrower dtype can represent exactly.
        dtype: the narrower dtype.
    """
    rounded = values.to(dtype)
    outside = (rounded.to(values.dtype) - origin).abs() > (values - origin).abs()
    return torch.where(outside, torch.nextafter(rounded, origin.to(dtype)), rounded)


def predicted(scores: Tensor) -> Tensor:
    """Return the class of the largest logit, or -1, which is no class, if a logit is not finite; ``(batch,)``."""
    return torch.where(scores.isfinite().all(1), scores.argmax(1), -1)


def at_least_float32(scores: Tensor) -> Tensor:
    """Return logits (or images) in float32 if they are in half precision; others unchanged."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def mixed_seed(seed: int, index: int, stream: int = 0) -> int:
    """Return a seed in [0, 2^63) for one sample and one stream of random numbers."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7 + 1) % 2**63


def _draws(shape: Sequence[int], seed: int, index: int, stream: int, norm: Norm) -> Tensor:
    """Return a random point of the unit ball, on the CPU."""
    generator = _generator(seed, index, stream)
    if norm == "linf":
        return torch.rand(shape, generator=generator) * 2 - 1
    direction = torch.randn(shape, generator=generator)
    return direction / direction.norm().clamp_min(_tiny(direction)) * torch.rand((), generator=generator)  # type: ignore[no-any-return]


def _generator(seed: int, index: int, stream: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(seed, index, stream))


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Return one value per image, ``(batch,)``, as a view that can be broadcast over images."""
    return values.view(-1, *[1] * (images.ndim - 1))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
