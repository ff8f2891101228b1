"""The sets of allowed adversarial images: balls in l∞ and l2 within a box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.random_numbers.counter_random import normals, sample_numbers, uniforms
from lightning_normgeo.robustness.attacks.random_numbers.ieee_arithmetic import ordered_lengths
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import RADII, STARTS

Norm = Literal["linf", "l2"]
Bound = float | Tensor
"""A bound on image values: one number, or a tensor of one per channel that can be broadcast over images."""


@dataclass(frozen=True)
class Ball:
    r"""The set of allowed adversarial images: a ball :math:`\lVert x' - x\rVert \le \epsilon` intersected with a box.

    Attributes:
        norm: ``linf`` or ``l2``, over all elements of an image.
        eps: radius ε ≥ 0, in the units of the images; one number, or a tensor of one per image to be broadcast.
        lower: lower bound of the box, in the units of the images.
        upper: upper bound of the box. If an original is outside the box, the box takes precedence over the ball.
        box_first: order of the two projections in l2. True: first onto the box, then onto the ball, and onto the box
            once more after the last step, as in advertorch. False: first onto the ball, then onto the box, as in
            torchattacks and foolbox.
        representable: rounds adversarial images, given the originals, to values that the model's precision can
            represent; None for no rounding.
    """

    norm: Norm
    eps: float | Tensor
    lower: Bound
    upper: Bound
    box_first: bool = False
    representable: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def order(self) -> float:
        """Order of the norm."""
        return float("inf") if self.norm == "linf" else 2.0

    def ascend(self, images: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
        """Return images after one step of ascent, along the sign of the gradient (l∞) or the unit gradient (l2).

        Elements of the gradient that are not finite count as zero.

        Args:
            images: ``(batch, channels, …)``.
            gradient: gradient of the loss with respect to ``images``.
            step_size: l∞ or l2 norm of the step; one number, or a tensor that can be broadcast over images.
        """
        gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.norm == "linf":
            return images + step_size * gradient.sign()
        # divided by the largest element first, since squares of small gradients underflow in float32
        scaled = gradient / per_image(gradient.abs().flatten(1).amax(1).clamp_min(_tiny(gradient)), gradient)
        return images + step_size * scaled / per_image(lengths(scaled).clamp_min(_tiny(gradient)), gradient)

    def project(
        self, adversarial: Tensor, images: Tensor, length_of: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return ``adversarial`` projected onto the ball around ``images`` and onto the box.

        Args:
            adversarial: ``(batch, channels, …)``.
            images: the originals.
            length_of: returns the l2 norm of each image's perturbation. Default: :func:`lengths`.
        """
        moved = self._projected(adversarial, images, length_of or lengths)
        return moved if self.representable is None else self.representable(moved, images)

    def finish(self, adversarial: Tensor) -> Tensor:
        """Return the last iterates, projected onto the box if ``box_first`` left them outside it."""
        return self._boxed(adversarial) if self.box_first and self.norm == "l2" else adversarial

    def _projected(self, adversarial: Tensor, images: Tensor, length_of: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm == "linf":
            return self._boxed(torch.minimum(torch.maximum(adversarial, images - self.eps), images + self.eps))
        if self.box_first:
            return self._shrunk(self._boxed(adversarial), images, length_of)
        return self._boxed(self._shrunk(adversarial, images, length_of))

    def _boxed(self, images: Tensor) -> Tensor:
        return images.clamp(self.lower, self.upper)  # type: ignore[arg-type]

    def _shrunk(self, adversarial: Tensor, images: Tensor, length_of: Callable[[Tensor], Tensor]) -> Tensor:
        perturbation = adversarial - images
        radius = self.eps.flatten() if isinstance(self.eps, Tensor) else self.eps
        shrink = (radius / length_of(perturbation).clamp_min(_tiny(images))).clamp_max(1.0)
        return images + perturbation * per_image(shrink, images)

    def sample(
        self,
        images: Tensor,
        seed: int,
        indices: Sequence[int] | Tensor,
        restart: int | Tensor = 0,
        surface: bool = False,
    ) -> Tensor:
        """Return random points of the ball, projected onto the box.

        They are uniform in l∞; in l2 they have a uniform direction and a uniform radius in [0, eps]. As with
        :func:`gaussian_noise`, a point depends only on ``seed``, the sample's index and ``restart``.

        Args:
            images: ``(batch, channels, …)``, the originals.
            seed: seed of the evaluation.
            indices: a number for each sample.
            restart: number of the start, from 0; one number, or ``(batch,)`` int64.
            surface: whether to move each point along its direction to the surface of the ball, before the box.
        """
        samples = sample_numbers(indices, images.device)
        offsets = _unit_points(self.norm, images.shape, seed, samples, restart, surface).to(images.dtype)
        return self.project(images + offsets.mul_(self.eps), images, ordered_lengths)


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


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Return one value per image, ``(batch,)``, as a view that can be broadcast over images."""
    return values.view(-1, *[1] * (images.ndim - 1))


def _unit_points(
    norm: Norm, shape: torch.Size, seed: int, samples: Tensor, restart: int | Tensor, surface: bool
) -> Tensor:
    """Return random points of the unit ball, or of its surface, float32."""
    count = shape[1:].numel()
    if norm == "linf":
        points = uniforms(seed, samples, STARTS + restart, count).mul_(2.0).sub_(1.0)
        if surface:
            points /= points.abs().amax(1, keepdim=True).clamp_min(_tiny(points))
        return points.view(shape)
    points = normals(seed, samples, STARTS + restart, count)
    points /= ordered_lengths(points)[:, None]
    if not surface:
        points *= uniforms(seed, samples, RADII + restart, 1)
    return points.view(shape)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
