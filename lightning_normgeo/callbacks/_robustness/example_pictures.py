"""Pictures of example images and of their perturbations, for loggers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.robustness.attacks.search.losses import NO_CLASS
from lightning_normgeo.robustness.results.example_images import ExampleImages
from lightning_normgeo.utilities.attack_names import is_control

_SHOWN_HEIGHT = 96
"""Small images are enlarged to at least this many pixels, so that they can be seen in a report."""


def example_strips(shown: ExampleImages, count: int) -> tuple[list[Any], list[str]]:
    """Return one strip of pictures per sample, and its caption.

    A strip shows, from left to right, the image under each attack, then each perturbation, scaled so that its largest
    value has full contrast around gray. The control with rescaled weights is left out, as it looks the same.

    Images with one or three channels are drawn as they are; of any other number of channels the first is drawn. A
    one-dimensional signal is drawn as a row of gray values, a volume by its middle slice.

    Args:
        shown: the example images of an evaluation.
        count: largest number of samples to draw.

    Returns:
        Strips as ``(height, width, channels)`` uint8 arrays, and captions with the label and the predictions.
    """
    strips, captions = [], []
    seen = {name: images for name, images in shown.pixels.items() if not is_control(name)}
    for index in list(shown.labels)[:count]:
        pixels = {name: _as_picture(images[index]) for name, images in seen.items() if index in images}
        tiles = [image.clamp(0, 1) for image in pixels.values()]
        tiles += [_contrast(image - pixels["clean"]) for name, image in pixels.items() if name != "clean"]
        strips.append(_as_array(torch.cat([_enlarge(tile) for tile in tiles], dim=-1)))
        predicted = ", ".join(f"{name} → {_class(shown.predictions[name][index])}" for name in pixels)
        captions.append(f"label {shown.labels[index]}: {predicted}")
    return strips, captions


def _class(predicted: int) -> str:
    return "not finite" if predicted == NO_CLASS else str(predicted)


def _as_picture(image: Tensor) -> Tensor:
    """Return an input of any shape as an image of shape ``(1 or 3, height, width)``."""
    if image.ndim == 1:
        image = image[None, None]
    elif image.ndim == 2:
        image = image[None]
    while image.ndim > 3:  # the middle slice
        image = image[:, image.shape[1] // 2]
    if image.shape[0] not in (1, 3) and image.shape[-1] in (1, 3):
        image = image.movedim(-1, 0)
    return image if image.shape[0] in (1, 3) else image[:1]


def _contrast(perturbation: Tensor) -> Tensor:
    return 0.5 + 0.5 * perturbation / perturbation.abs().amax().clamp_min(1e-12)


def _enlarge(tile: Tensor) -> Tensor:
    factor = -(-_SHOWN_HEIGHT // tile.shape[-2])
    return F.interpolate(tile[None].float(), scale_factor=factor, mode="nearest")[0] if factor > 1 else tile.float()


def _as_array(image: Tensor) -> Any:
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
