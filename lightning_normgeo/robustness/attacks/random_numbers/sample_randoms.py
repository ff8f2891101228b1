"""Random numbers that depend on a seed and a sample alone, and Gaussian noise made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.random_numbers.counter_random import normals, sample_numbers

# first streams of what is drawn for a sample, far from each other; those of the square attack begin at 0
NOISE, STARTS, RADII, CORRUPTED, FOREIGN = (kind * 2**28 for kind in range(1, 6))


def gaussian_noise(
    images: Tensor,
    std: float,
    seed: int,
    indices: Sequence[int] | Tensor,
    bounds: tuple[float | Tensor, float | Tensor] | None = None,
) -> Tensor:
    """Return images plus white Gaussian noise, which is drawn for each sample by itself, on the images' device.

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
    samples = sample_numbers(indices, images.device)
    noise = normals(seed, samples, NOISE, images.shape[1:].numel()).view(images.shape)
    noisy = images + noise.to(images.dtype).mul_(std)
    return noisy if bounds is None else noisy.clamp_(*bounds)  # type: ignore[arg-type]


def mixed_seed(seed: int, index: int, stream: int = 0) -> int:
    """Return a seed in [0, 2^63) for one sample and one stream of random numbers of torch's own generators."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7 + 1) % 2**63


def generator(seed: int, index: int, stream: int = 0) -> torch.Generator:
    """Return a generator of torch on the CPU for one sample and one stream, for draws of another kind."""
    return torch.Generator().manual_seed(mixed_seed(seed, index, stream))
