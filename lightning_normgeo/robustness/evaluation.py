"""Evaluate a classifier batch by batch: clean, under Gaussian noise, under BIM. Needs torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError, closest
from lightning_normgeo.robustness.attacks import Logits, bim_linf, gaussian_noise
from lightning_normgeo.robustness.intervals import wilson_interval
from lightning_normgeo.robustness.threat import InputSpace, ThreatModel

ATTACKS = ("gaussian", "bim")
"""The attacks by name; ``clean`` is always evaluated."""


@dataclass(frozen=True)
class AttackResult:
    """Counted accuracy under one attack.

    Attributes:
        correct: samples classified correctly.
        n: samples evaluated.
        accuracy: correct / n.
        accuracy_drop: clean accuracy minus accuracy (the paper's Acc-Diff), in [-1, 1].
        ci_low: lower end of the 95 % Wilson interval of the accuracy.
        ci_high: upper end.
    """

    correct: int
    n: int
    accuracy: float
    accuracy_drop: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Perturbed:
    """One batch after every attack, in pixels, with predictions; for showing."""

    pixels: dict[str, Tensor]
    predictions: dict[str, Tensor]
    labels: Tensor


class RobustnessEvaluator:
    """Counts correct classifications; holds no model and no data.

    Args:
        threat: the threat model.
        inputs: what the images that come in are.
        attacks: names out of :data:`ATTACKS`.
        seed: of the Gaussian noise.
    """

    def __init__(
        self, threat: ThreatModel, inputs: InputSpace, attacks: Sequence[str] = ATTACKS, seed: int = 0
    ) -> None:
        for name in attacks:
            if name not in ATTACKS:
                raise ConfigurationError(
                    f"attacks={list(attacks)}: {name!r} is unknown; known are {closest(name, ATTACKS)}."
                )
        self.threat = threat
        self.inputs = inputs
        self.attacks = ("clean", *(name for name in ATTACKS if name in attacks))
        self.seed = seed
        self.counts = torch.zeros(len(self.attacks) + 1, dtype=torch.long)

    def evaluate(self, logits: Logits, images: Tensor, labels: Tensor, indices: Sequence[int]) -> Perturbed:
        """Evaluate one batch and add it to the counts.

        Args:
            logits: the model, for images in the form the loader yields; in evaluation mode.
            images: ``(batch, channels, …)``, floating point.
            labels: ``(batch,)`` class indices.
            indices: position of each sample in the data set.

        Raises:
            ConfigurationError: for images outside [0, 1] where pixels are expected, or labels out of range.
        """
        space = self.threat.space
        check_images(images, self.inputs)
        original = self.inputs.to_space(images, space)

        def model(x: Tensor) -> Tensor:
            return logits(self.inputs.from_space(x, space))

        pixels, predictions = {}, {}
        with torch.no_grad():
            scores = logits(images)
        check_labels(labels, scores)
        for name in self.attacks:
            perturbed = original if name == "clean" else self._perturb(name, model, original, labels, indices)
            with torch.no_grad():
                predictions[name] = scores.argmax(1) if name == "clean" else model(perturbed).argmax(1)
            pixels[name] = self.inputs.to_pixels(perturbed, space)
        correct = torch.stack([(predictions[name] == labels).sum() for name in self.attacks])
        counts = torch.cat([correct, torch.tensor([labels.numel()]).to(correct.device)])
        self.counts = self.counts.to(counts.device) + counts
        return Perturbed(pixels, predictions, labels)

    def results(self, counts: Tensor | None = None) -> dict[str, AttackResult]:
        """Return the results so far.

        Args:
            counts: counts summed over processes; this process's own if left out.
        """
        *correct, n = (self.counts if counts is None else counts).tolist()
        clean = correct[0] / n if n else 0.0
        results = {}
        for name, hits in zip(self.attacks, correct, strict=True):
            accuracy = hits / n if n else 0.0
            results[name] = AttackResult(hits, n, accuracy, clean - accuracy, *wilson_interval(hits, n))
        return results

    def settings(self) -> dict[str, Any]:
        """Return what decides the results, as plain values."""
        return {
            "threat": self.threat.settings(),
            "attacks": list(self.attacks),
            "seed": self.seed,
            "loss": "cross_entropy",
        }

    def _perturb(self, name: str, model: Logits, images: Tensor, labels: Tensor, indices: Sequence[int]) -> Tensor:
        threat = self.threat
        if name == "gaussian":
            bounds = (threat.lower, threat.upper) if threat.clip_noise else None
            return gaussian_noise(images, threat.noise_std, self.seed, indices, bounds)
        return bim_linf(model, images, labels, threat.eps, threat.step_size, threat.steps, threat.lower, threat.upper)


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
