"""Perturbations: the basic iterative method in l∞, and Gaussian noise. Pure functions of images and logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Logits = Callable[[Tensor], Tensor]


def bim_linf(
    logits: Logits, images: Tensor, labels: Tensor, eps: float, step_size: float, steps: int, lower: float, upper: float
) -> Tensor:
    r"""Return adversarial images of the basic iterative method (Kurakin et al. 2017), untargeted, last iterate.

    .. math:: x_{k+1} = \mathrm{clip}_{[lower, upper]}\, \mathrm{clip}_{[x - \epsilon, x + \epsilon]}
              \bigl(x_k + \alpha\,\mathrm{sign}\,\nabla_x \mathrm{CE}(f(x_k), y)\bigr)

    No random start. Gradients are taken with respect to the images alone: no parameter's ``.grad`` is touched.

    Args:
        logits: maps images of the given space to class logits, without changing state.
        images: ``(batch, channels, …)``.
        labels: ``(batch,)`` class indices.
        eps: radius of the ball, in units of ``images``.
        step_size: α.
        steps: number of iterations.
        lower: lower end of the box.
        upper: upper end of the box.

    Returns:
        Images within ``eps`` of the originals, and within the box. Where an original is outside the box, the box wins.

    Cost: ``steps`` forward passes and backward passes to the input.
    """
    images, labels = images.detach(), labels.clone()  # labels may be inference tensors
    floor, ceiling = images - eps, images + eps
    adversarial = images.clone()
    for _ in range(steps):
        with torch.enable_grad():
            adversarial.requires_grad_(True)
            # the sum, not the mean: no sample's gradient depends on the size of the batch
            loss = F.cross_entropy(_at_least_float32(logits(adversarial)), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, adversarial)
        with torch.no_grad():
            adversarial = adversarial.detach() + step_size * gradient.sign()
            adversarial = torch.minimum(torch.maximum(adversarial, floor), ceiling).clamp_(lower, upper)
    return adversarial


def gaussian_noise(
    images: Tensor, std: float, seed: int, indices: Sequence[int], bounds: tuple[float, float] | None = None
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
    noise = torch.stack([_standard_normal(images.shape[1:], seed, int(index)) for index in indices])
    noisy = images + std * noise.to(images.device, images.dtype)
    return noisy if bounds is None else noisy.clamp(*bounds)


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _standard_normal(shape: Sequence[int], seed: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 1) % 2**63)
    return torch.randn(shape, generator=generator)
