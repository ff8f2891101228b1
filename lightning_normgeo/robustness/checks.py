"""What an evaluation asks of images and labels, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.threat import InputSpace


def check_images(images: Tensor, inputs: InputSpace) -> None:
    """Check that images are floating point and that their pixels are within [0, 1].

    Raises:
        ConfigurationError: otherwise.
    """
    if not images.is_floating_point():
        raise ConfigurationError(f"Images have dtype {images.dtype}; expected floating point in [0, 1].")
    pixels = inputs.to_space(images.detach(), "pixel")
    low, high = pixels.amin().item(), pixels.amax().item()
    slack = 1e-3 if inputs.normalized_data else 1e-6  # what normalizing and back can cost
    if low >= -slack and high <= 1 + slack:
        return
    if inputs.normalized_data:
        raise ConfigurationError(
            f"With the declared mean={inputs.mean} and std={inputs.std} the images are pixels in [{low:.3g}, "
            f"{high:.3g}], not in [0, 1]. Declare the mean and std that the data pipeline really uses; "
            "leave both out where images are pixels and the model normalizes."
        )
    raise ConfigurationError(
        f"Images are expected to be pixels in [0, 1] but span [{low:.3g}, {high:.3g}]. If the data pipeline normalizes "
        "them, give RobustnessEvaluation the same mean=… and std=…; if they are in 0…255, divide by 255."
    )


def check_labels(labels: Tensor, scores: Tensor) -> None:
    """Check that labels are class indices of the model's logits.

    Raises:
        ConfigurationError: otherwise.
    """
    if not isinstance(scores, Tensor):
        raise ConfigurationError(
            f"Expected logits (batch, classes), got {type(scores).__name__}. Override RobustnessEvaluation.logits to "
            "return the logits of a model with several outputs."
        )
    if scores.ndim != 2 or labels.ndim != 1 or scores.shape[0] != labels.shape[0]:
        raise ConfigurationError(
            f"Expected logits (batch, classes) and labels (batch,), got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}. Override RobustnessEvaluation.logits or .unpack for other models."
        )
    low, high = labels.amin().item(), labels.amax().item()
    if low < 0 or high >= scores.shape[1]:
        raise ConfigurationError(
            f"Labels span {low}…{high}, but the model has {scores.shape[1]} classes (0…{scores.shape[1] - 1}). "
            "Set num_classes to the number of classes in the data."
        )


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, every module's mode and torch's random state are bit for bit what they were.

    Works under ``torch.inference_mode``: gradients can be taken inside.
    """
    modes = {child: child.training for child in module.modules()}
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices):
        try:
            module.eval()
            yield
        finally:
            for child, training in modes.items():
                child.training = training
