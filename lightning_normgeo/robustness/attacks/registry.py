"""Registry of attacks: from names and settings to one attack for each row of the results."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.projected_gradient import (
    Ball,
    Bound,
    Norm,
    gaussian_noise,
    per_image,
    projected_gradient,
)
from lightning_normgeo.robustness.attacks.torchattacks_attack import check_torchattacks, torchattacks_attack
from lightning_normgeo.robustness.threat_model import InputSpace, ThreatModel
from lightning_normgeo.utilities.checked_values import nearest, short_repr

ATTACKS = ("gaussian", "bim", "pgd", "bim_l2", "pgd_l2")
"""Names of the attacks, besides ``torchattacks.<name>``; ``clean`` is always evaluated."""
DEFAULT_ATTACKS = ("gaussian", "bim")
"""Attacks that are evaluated unless others are named."""
FOREIGN = "torchattacks."
"""Prefix of the names of torchattacks' attacks."""


@dataclass(frozen=True)
class AttackBatch:
    """A batch of samples to be attacked.

    Attributes:
        logits: maps images in the threat model's space to logits.
        images: ``(batch, channels, …)`` in the threat model's space.
        labels: ``(batch,)`` class indices.
        indices: a number for each sample, which seeds its random numbers.
        box: lower and upper bound of image values.
        gradient: gradient of the loss at ``images``; None if it is not known.
        inputs: how images relate to pixels.
        threat: the threat model.
        seed: seed of the evaluation.
        representable: see :class:`Ball`.
        counted: mask of the samples that count, on the host; None for all.
    """

    logits: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor
    indices: Sequence[int]
    box: tuple[Bound, Bound]
    gradient: Tensor | None
    inputs: InputSpace
    threat: ThreatModel
    seed: int
    representable: Callable[[Tensor, Tensor], Tensor] | None = None
    counted: Tensor | None = None

    def part(self, which: Tensor) -> AttackBatch:
        """Return the samples of a mask as a batch."""
        indices = [index for index, wanted in zip(self.indices, which.tolist(), strict=True) if wanted]
        gradient = None if self.gradient is None else self.gradient[which]
        return replace(self, images=self.images[which], labels=self.labels[which], indices=indices, gradient=gradient)


@dataclass(frozen=True)
class Attack:
    """An attack, which makes one row of the results.

    Attributes:
        name: the name of the row, as in metric keys.
    """

    name: str

    def perturb(self, batch: AttackBatch) -> Tensor:
        """Return the attacked images, in the threat model's space."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the result, as plain values."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


@dataclass(frozen=True)
class Noise(Attack):
    """White Gaussian noise.

    Attributes:
        std: standard deviation, in units of the threat model's space.
        clip: whether to clip noisy images to the box.
    """

    std: float
    clip: bool

    def perturb(self, batch: AttackBatch) -> Tensor:
        """Return noisy images."""
        return gaussian_noise(batch.images, self.std, batch.seed, batch.indices, batch.box if self.clip else None)


@dataclass(frozen=True)
class ProjectedGradient(Attack):
    """BIM or PGD.

    Attributes:
        norm: norm of the ball, ``linf`` or ``l2``.
        eps: radius of the ball, in units of the threat model's space.
        step_size: step size of one iteration, in the same units.
        times_sqrt_d: whether to multiply ``eps`` and ``step_size`` by √d, with d values per image.
        steps: number of iterations.
        random_start: whether to start at a random point of the ball (PGD) instead of the image (BIM).
        restarts: number of starts; a sample is robust only if it withstands all.
    """

    norm: Norm
    eps: float
    step_size: float
    times_sqrt_d: bool
    steps: int
    random_start: bool
    restarts: int

    def scale(self, values: int) -> float:
        """Return the factor of the radius and the step size for images with this number of values."""
        return values**0.5 if self.times_sqrt_d else 1.0

    def ball(self, batch: AttackBatch) -> tuple[Ball, float]:
        """Return the ball and the step size for the images of a batch."""
        scale = self.scale(batch.images[0].numel())
        ball = Ball(self.norm, self.eps * scale, *batch.box, batch.threat.box_first, batch.representable)
        return ball, self.step_size * scale

    def perturb(self, batch: AttackBatch, restart: int = 0) -> Tensor:
        """Return the last iterates of the start number ``restart``."""
        ball, step_size = self.ball(batch)
        start = ball.sample(batch.images, batch.seed, batch.indices, restart) if self.random_start else None
        gradient = None if self.random_start else batch.gradient
        return projected_gradient(
            batch.logits, batch.images, batch.labels, ball, step_size, self.steps, start, gradient
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the result, as plain values."""
        return {**super().settings(), "loss": "cross_entropy"}


@dataclass(frozen=True)
class TorchattacksAttack(Attack):
    """An attack of torchattacks, which works on pixels.

    Attributes:
        attack: name of its class in torchattacks.
        options: arguments for its constructor.
        version: installed version of torchattacks.
    """

    attack: str
    options: dict[str, Any] = field(default_factory=dict)
    version: str = ""

    @property
    def eps(self) -> float | None:
        """The radius among the options, in pixels; None if the attack has none."""
        return self.options.get("eps")

    def perturb(self, batch: AttackBatch) -> Tensor:
        """Return the attacked images."""
        space = batch.threat.space
        pixels = batch.inputs.to_pixels(batch.images, space).clamp(0, 1)

        def logits(x: Tensor) -> Tensor:
            return batch.logits(batch.inputs.pixels_to_space(x, space))

        attacked = torchattacks_attack(
            self.attack, logits, pixels, batch.labels, self.options, batch.indices, batch.seed
        )
        # unchanged samples are returned as they were, since converting to pixels and back rounds
        same = per_image((attacked == pixels).flatten(1).all(1), pixels)
        return torch.where(same, batch.images, batch.inputs.pixels_to_space(attacked, space))


def attack_list(
    threat: ThreatModel,
    names: Sequence[str] = DEFAULT_ATTACKS,
    sweep: Mapping[str, Sequence[float]] | None = None,
    restarts: int = 1,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    same_step: bool = False,
) -> list[Attack]:
    """Return the attacks of the given names, with one attack for each value of a sweep.

    Args:
        threat: has the settings that are not in ``sweep``.
        names: names out of :data:`ATTACKS`, or ``torchattacks.<name>``.
        sweep: several values for any of ``eps``, ``eps_l2`` and ``noise_std``.
        restarts: number of random starts of PGD.
        options: constructor arguments of torchattacks' attacks, by name of the attack.
        same_step: whether attacks in l∞ use the threat model's step size for every radius. Default: the step size keeps
            its ratio to the radius.

    Raises:
        ConfigurationError: for unknown names and options.
    """
    unused = set(options or {}) - set(names)
    if unused:
        raise ConfigurationError(
            f"attack_options has an entry for {min(unused)!r}, which is not among attacks={names}."
        )
    for name in names:
        if name not in ATTACKS and not name.startswith(FOREIGN):
            raise ConfigurationError(
                f"attacks={short_repr(list(names))}: {name!r} is unknown; {nearest(name, ATTACKS)}, and any attack of "
                "torchattacks as 'torchattacks.…'."
            )
    return [
        attack for name in names for attack in _attacks(name, threat, sweep or {}, restarts, options or {}, same_step)
    ]


def _attacks(
    name: str,
    threat: ThreatModel,
    sweep: Mapping[str, Sequence[float]],
    restarts: int,
    options: Mapping[str, Mapping[str, Any]],
    same_step: bool,
) -> list[Attack]:
    """Return the attacks of one name, one for each value of a sweep."""
    if name.startswith(FOREIGN):
        return _foreign(name, threat, sweep.get("eps", [threat.eps]), options.get(name, {}), same_step)
    if name in options:
        raise ConfigurationError(f"attack_options[{name!r}]: only attacks of torchattacks take options.")
    if name == "gaussian":
        stds = sweep.get("noise_std", [threat.noise_std])
        return [Noise(_swept(name, "std", std, stds), std, threat.clip_noise) for std in stds]
    norm: Norm = "l2" if name.endswith("_l2") else "linf"
    times_sqrt_d = norm == "l2" and "eps_l2" not in sweep and threat.eps_l2 is None
    radius = threat.eps if norm == "linf" or threat.eps_l2 is None else threat.eps_l2
    radii = sweep.get("eps_l2" if norm == "l2" else "eps", [radius])
    random_start = name.startswith("pgd")
    return [
        ProjectedGradient(
            name=_swept(name, "eps", eps, radii),
            norm=norm,
            eps=eps,
            step_size=step_size(threat, eps, same_step and norm == "linf"),
            times_sqrt_d=times_sqrt_d,
            steps=threat.steps,
            random_start=random_start,
            restarts=restarts if random_start else 1,
        )
        for eps in radii
    ]


def _foreign(
    name: str, threat: ThreatModel, radii: Sequence[float], options: Mapping[str, Any], same_step: bool
) -> list[Attack]:
    """Return torchattacks' attack for each radius, or one attack if its arguments do not depend on the radius."""
    attack = name.removeprefix(FOREIGN)
    threats = [replace(threat, eps=eps, step_size=step_size(threat, eps, same_step)) for eps in radii]
    chosen = [check_torchattacks(attack, one, options) for one in threats]
    if all(one == chosen[0] for one in chosen):
        radii, chosen = radii[:1], chosen[:1]
    version = importlib.metadata.version("torchattacks")
    return [
        TorchattacksAttack(_swept(name, "eps", eps, radii), attack, arguments, version)
        for eps, arguments in zip(radii, chosen, strict=True)
    ]


def step_size(threat: ThreatModel, eps: float, same: bool = False) -> float:
    """Return the step size for a radius: the threat model's own, or one with the same step-to-radius ratio.

    Args:
        threat: the threat model.
        eps: the radius.
        same: whether to use the threat model's step size for every radius.
    """
    if same or eps == threat.eps:
        return threat.step_size
    return threat.step_size * eps / (threat.eps or 1.0)


def _swept(name: str, what: str, value: float, values: Sequence[float]) -> str:
    """Return the name of a row, with the value of the setting ``what`` if there are several."""
    return name if len(values) == 1 else f"{name}_{what}{value:.4g}"
