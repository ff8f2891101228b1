"""Perturbations: projected gradient ascent in l∞ and l2 balls (BIM, PGD), and Gaussian noise. Pure functions."""

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
"""One number, or one for each channel in a tensor that can be broadcast."""


@dataclass(frozen=True)
class Ball:
    r"""What an adversarial image may be: :math:`\lVert x' - x\rVert \le \epsilon` within a box.

    Attributes:
        norm: ``linf`` or ``l2``, over all elements of an image.
        eps: radius, in the units of the images.
        lower: lower end of the box.
        upper: upper end. Where an original is outside the box, the box wins.
        box_first: whether an l2 step is brought into the box and then into the ball, and into the box once more at the
            end, as advertorch does; else into the ball and then into the box, as torchattacks and foolbox do.
        representable: brings images to values that the model's precision has, given the originals; None where it has
            all.
    """

    norm: Norm
    eps: float
    lower: Bound
    upper: Bound
    box_first: bool = False
    representable: Callable[[Tensor, Tensor], Tensor] | None = None

    def ascend(self, images: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Return images one step up: along the sign of the gradient, or along the gradient of unit length.

        Elements of the gradient that are not finite count as zero.
        """
        gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.norm == "linf":
            return images + step_size * gradient.sign()
        # the largest element is taken off first: squares of small gradients are zero in float32
        scaled = gradient / per_image(gradient.abs().flatten(1).amax(1).clamp_min(_tiny(gradient)), gradient)
        return images + step_size * scaled / per_image(lengths(scaled).clamp_min(_tiny(gradient)), gradient)

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Return the points of the ball around ``images``, and of the box, next to ``adversarial``."""
        moved = self._projected(adversarial, images)
        return moved if self.representable is None else self.representable(moved, images)

    def finish(self, adversarial: Tensor) -> Tensor:
        """Return what becomes of the last iterate: with ``box_first`` it is brought into the box."""
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
        """Return random points of the ball: uniform in l∞; in l2 of uniform direction and radius.

        As with :func:`gaussian_noise`, a point depends on ``seed``, the sample's index and ``restart`` alone.
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
    r"""Return adversarial images of projected gradient ascent, untargeted, last iterate.

    .. math:: x_{k+1} = \Pi\bigl(x_k + \alpha\, d(\nabla_x \mathrm{CE}(f(x_k), y))\bigr), \quad
              d(g) = \mathrm{sign}\, g \;(l_\infty) \text{ or } g / \lVert g\rVert_2 \;(l_2)

    Started at the image this is the basic iterative method (BIM, Kurakin et al. 2017), from a random point PGD
    (Madry et al. 2018). Gradients are taken with respect to the images alone: no parameter's ``.grad`` is touched.

    Args:
        logits: maps images of the given space to class logits, without changing state.
        images: ``(batch, channels, …)``.
        labels: ``(batch,)`` class indices.
        ball: Π projects onto it.
        step_size: α, in units of ``images``.
        steps: number of iterations.
        start: where to start, ``images`` if left out.
        gradient: ∇ at the start, where it is known already.

    Returns:
        Images within the ball and the box.

    Cost: ``steps`` forward passes and backward passes to the input, one less where ``gradient`` is given.
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
    """Return adversarial images of the basic iterative method in l∞; see :func:`projected_gradient`."""
    return projected_gradient(logits, images, labels, Ball("linf", eps, lower, upper), step_size, steps)


def ascent(logits: Logits, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, the cross entropy of each image, and its gradient with respect to the image.

    Cost: one forward pass and one backward pass to the input.
    """
    labels = labels.clone()  # they may be inference tensors
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_(True)
        scores = at_least_float32(logits(images))
        losses = F.cross_entropy(scores, labels, reduction="none")
        # the sum, not the mean: no sample's gradient depends on the size of the batch
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    return scores.detach(), losses.detach(), gradient


def gaussian_noise(
    images: Tensor, std: float, seed: int, indices: Sequence[int], bounds: tuple[Bound, Bound] | None = None
) -> Tensor:
    """Return images plus white Gaussian noise; each sample has its own generator.

    The noise of a sample depends on ``seed`` and its index alone: not on batch size, device, number of processes, or
    the global random state, which is neither read nor advanced.

    Args:
        images: ``(batch, …)``.
        std: standard deviation, in units of ``images``.
        seed: of the evaluation.
        indices: position of each sample in the data set.
        bounds: clip to this interval; None for no clipping.

    Raises:
        ValueError: unless there is one index per image.
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
    """Return the numbers of a narrower dtype next to ``values``, on the side of ``origin``, which has that dtype.

    So no distance from ``origin`` grows by rounding, in any norm.
    """
    rounded = values.to(dtype)
    outside = (rounded.to(values.dtype) - origin).abs() > (values - origin).abs()
    return torch.where(outside, torch.nextafter(rounded, origin.to(dtype)), rounded)


def predicted(scores: Tensor) -> Tensor:
    """Return the class of the largest logit; -1 where a logit is not finite, which is no class."""
    return torch.where(scores.isfinite().all(1), scores.argmax(1), -1)


def at_least_float32(scores: Tensor) -> Tensor:
    """Return logits in which a loss can be computed."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def mixed_seed(seed: int, index: int, stream: int = 0) -> int:
    """Return a seed of a sample's own."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7 + 1) % 2**63


def _draws(shape: Sequence[int], seed: int, index: int, stream: int, norm: Norm) -> Tensor:
    generator = _generator(seed, index, stream)
    if norm == "linf":
        return torch.rand(shape, generator=generator) * 2 - 1
    direction = torch.randn(shape, generator=generator)
    return direction / direction.norm().clamp_min(_tiny(direction)) * torch.rand((), generator=generator)  # type: ignore[no-any-return]


def _generator(seed: int, index: int, stream: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(seed, index, stream))


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """View one value per image so that it can be broadcast over images."""
    return values.view(-1, *[1] * (images.ndim - 1))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
