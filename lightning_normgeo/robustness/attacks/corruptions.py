"""Common corruptions of images at five severities, drawn for each sample by itself.

They are of the kinds of Hendrycks and Dietterich 2019, made by torch and torchvision instead of their code, so that the
numbers are not those of CIFAR-10-C or ImageNet-C, and the names are others.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.attacks.attack import Attack, AttackBatch
from lightning_normgeo.robustness.attacks.random_numbers.counter_random import normals, sample_numbers, uniforms
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import CORRUPTED, generator

SEVERITIES = (1, 2, 3, 4, 5)
"""All severities."""
_SIDE = 32
"""Side of an image, in pixels, for which lengths are given; they grow with the image."""
Drawn = Any
"""Random numbers of one sample: a tensor, a generator, or None."""


def _noise(image: Tensor, amount: float, drawn: Tensor) -> Tensor:
    return image + amount * drawn.to(image.dtype)


def _speckle(image: Tensor, amount: float, drawn: Tensor) -> Tensor:
    return image + amount * image * drawn.to(image.dtype)


def _shot(image: Tensor, amount: float, draws: torch.Generator) -> Tensor:
    photons = torch.poisson(image.cpu().double().clamp(0, 1) * amount, generator=draws) / amount
    return photons.to(image.device, image.dtype)


def _impulse(image: Tensor, amount: float, drawn: Tensor) -> Tensor:
    return torch.where(drawn < amount / 2, 0.0, torch.where(drawn > 1 - amount / 2, 1.0, image))


def _blur(image: Tensor, amount: float, drawn: None) -> Tensor:
    from torchvision.transforms.v2 import functional as transforms

    sigma = amount * min(image.shape[-2:]) / _SIDE
    size = min(2 * int(3 * sigma + 0.5) + 1, 2 * ((min(image.shape[-2:]) - 1) // 2) + 1)
    blurred: Tensor = transforms.gaussian_blur(image, [max(size, 1)] * 2, [sigma] * 2)
    return blurred


def _pixelate(image: Tensor, amount: float, drawn: None) -> Tensor:
    height, width = image.shape[-2:]
    coarse = functional.adaptive_avg_pool2d(image, (max(int(height * amount), 1), max(int(width * amount), 1)))
    return functional.interpolate(coarse[None], (height, width), mode="nearest-exact")[0]


def _jpeg(image: Tensor, amount: float, drawn: None) -> Tensor:
    from PIL import Image

    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    picture = Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).numpy())
    with io.BytesIO() as file:
        picture.save(file, "JPEG", quality=int(amount))
        with Image.open(file) as opened:
            coded = torch.from_numpy(np.array(opened))
    coded = coded[None] if coded.ndim == 2 else coded.permute(2, 0, 1)
    return coded.to(image.device, image.dtype) / 255


def _elastic(image: Tensor, amount: float, drawn: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    smooth = functional.interpolate(drawn[None], (height, width), mode="bicubic", align_corners=True)
    moved = (2 * amount / _SIDE * smooth).permute(0, 2, 3, 1).to(image.dtype)  # in halves of an image
    whole = torch.eye(2, 3, device=image.device, dtype=image.dtype)[None]
    grid = functional.affine_grid(whole, [1, 1, height, width], align_corners=False)
    return functional.grid_sample(image[None], grid + moved, padding_mode="border", align_corners=False)[0]


def _brightness(image: Tensor, amount: float, drawn: None) -> Tensor:
    return image + amount


def _contrast(image: Tensor, amount: float, drawn: None) -> Tensor:
    mean = image.mean(dim=(-2, -1), keepdim=True)
    return mean + amount * (image - mean)


def _saturation(image: Tensor, amount: float, drawn: None) -> Tensor:
    gray = image.mean(dim=-3, keepdim=True)
    return gray + amount * (image - gray)


def _nothing(batch: AttackBatch, stream: int) -> Sequence[Drawn]:
    return [None] * len(batch.images)


def _normals(batch: AttackBatch, stream: int) -> Sequence[Drawn]:
    return _drawn(normals, batch, stream, batch.images.shape[1:])


def _uniforms(batch: AttackBatch, stream: int) -> Sequence[Drawn]:
    return _drawn(uniforms, batch, stream, batch.images.shape[1:])


def _directions(batch: AttackBatch, stream: int) -> Sequence[Drawn]:
    """Displacements, down and to the right, at 4 × 4 places of an image."""
    return _drawn(normals, batch, stream, torch.Size((2, 4, 4)))


def _generators(batch: AttackBatch, stream: int) -> Sequence[Drawn]:
    """Generators on the host: how many numbers a Poisson variable takes depends on the image."""
    return [generator(batch.seed, index, stream) for index in batch.indices]


def _drawn(
    draw: Callable[[int, Tensor, int, int], Tensor], batch: AttackBatch, stream: int, shape: torch.Size
) -> Sequence[Drawn]:
    samples = sample_numbers(batch.indices, batch.images.device)
    return draw(batch.seed, samples, stream, shape.numel()).view(len(samples), *shape).unbind()


@dataclass(frozen=True)
class Kind:
    """A kind of corruption.

    Attributes:
        change: returns a corrupted image ``(channels, height, width)`` in pixels, given an amount and what was drawn.
        amounts: the amount at each severity.
        meaning: what the amount is.
        draw: returns the random numbers of each sample of a batch in pixels, given a stream.
    """

    change: Callable[[Tensor, float, Drawn], Tensor]
    amounts: tuple[float, float, float, float, float]
    meaning: str
    draw: Callable[[AttackBatch, int], Sequence[Drawn]] = _nothing


CORRUPTIONS = {
    "noise": Kind(_noise, (0.04, 0.06, 0.08, 0.09, 0.10), "standard deviation of Gaussian noise", _normals),
    "shot": Kind(_shot, (500, 250, 100, 75, 50), "photons of a white pixel", _generators),
    "impulse": Kind(_impulse, (0.01, 0.02, 0.03, 0.05, 0.07), "share of values that become black or white", _uniforms),
    "speckle": Kind(_speckle, (0.06, 0.1, 0.12, 0.16, 0.2), "standard deviation of noise, over the pixel", _normals),
    "blur": Kind(_blur, (0.4, 0.6, 0.8, 1.0, 1.3), "σ of a Gaussian, in pixels of an image of 32"),
    "pixelate": Kind(_pixelate, (0.85, 0.75, 0.6, 0.45, 0.3), "resolution, over that of the image"),
    "jpeg": Kind(_jpeg, (80, 65, 58, 50, 40), "quality"),
    "elastic": Kind(_elastic, (0.5, 0.8, 1.1, 1.4, 1.8), "displacement in pixels of an image of 32", _directions),
    "brightness": Kind(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), "added to all pixels"),
    "contrast": Kind(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), "factor of deviations from the image's mean"),
    "saturation": Kind(_saturation, (0.7, 0.5, 0.3, 0.1, 0.0), "factor of deviations from gray"),
}
"""Corruptions by name. Corrupted images are clipped to [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Corruption(Attack):
    """A corruption of images.

    Attributes:
        corruption: a name of :data:`CORRUPTIONS`.
        severity: one of :data:`SEVERITIES`.
        amount: the amount at this severity.
    """

    corruption: str
    severity: int
    amount: float

    @property
    def part(self) -> str:
        """The kind of detail that the row is: one ``corruption`` at one severity."""
        return "corruption"

    @property
    def follows_model(self) -> bool:
        """Whether the attacked images depend on a model."""
        return False

    def perturb(self, batch: AttackBatch) -> Tensor:
        """Return corrupted images.

        Raises:
            UnsuitableError: for inputs that are no images of one or three channels.
        """
        if batch.images.ndim != 4 or batch.images.shape[1] not in (1, 3):
            raise UnsuitableError(
                f"Corruptions are for images of one or three channels, not for inputs {tuple(batch.images.shape[1:])}."
            )
        space, kind = batch.threat.space, CORRUPTIONS[self.corruption]
        stream = CORRUPTED + 10 * list(CORRUPTIONS).index(self.corruption) + self.severity
        pixels = batch.inputs.to_pixels(batch.images, space)
        changed = [
            kind.change(pixel, self.amount, drawn).clamp(0, 1)
            for pixel, drawn in zip(pixels, kind.draw(batch, stream), strict=True)
        ]
        return batch.inputs.pixels_to_space(torch.stack(changed), space) if changed else batch.images
