"""The attacks that are evaluated: names and settings in, one description for each row of the results out."""

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
from lightning_normgeo.utilities.checked_values import nearest, shown

ATTACKS = ("gaussian", "bim", "pgd", "bim_l2", "pgd_l2")
"""The attacks by name, besides ``torchattacks.…``; ``clean`` is always evaluated."""
DEFAULT_ATTACKS = ("gaussian", "bim")
FOREIGN = "torchattacks."


@dataclass(frozen=True)
class AttackBatch:
    """What an attack gets.

    Attributes:
        logits: the model, for images of the threat model's space.
        images: of that space.
        labels: class indices.
        indices: a number for each sample, which decides its random draws.
        box: what images have to stay in.
        gradient: of the loss at ``images``, where it is known.
        inputs: how that space relates to pixels.
        threat: the threat model.
        seed: of the evaluation.
        representable: see :class:`Ball`.
        counted: which samples count, on the host; None for all.
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
        """Return some of the samples."""
        indices = [index for index, wanted in zip(self.indices, which.tolist(), strict=True) if wanted]
        gradient = None if self.gradient is None else self.gradient[which]
        return replace(self, images=self.images[which], labels=self.labels[which], indices=indices, gradient=gradient)


@dataclass(frozen=True)
class Attack:
    """One row of the results besides ``clean``.

    Attributes:
        name: as in keys.
    """

    name: str

    def perturb(self, batch: AttackBatch) -> Tensor:
        """Return the attacked images, in the threat model's space."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what decides the result, as plain values."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


@dataclass(frozen=True)
class Noise(Attack):
    """White Gaussian noise.

    Attributes:
        std: standard deviation.
        clip: whether to clip to the box.
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
        norm: of the ball.
        eps: radius.
        step_size: of one iteration.
        times_sqrt_d: whether both are to be multiplied by √d, with d values per image.
        steps: iterations.
        random_start: whether to begin at a random point of the ball.
        restarts: how often to begin; a sample is robust only if it withstands all.
    """

    norm: Norm
    eps: float
    step_size: float
    times_sqrt_d: bool
    steps: int
    random_start: bool
    restarts: int

    def scale(self, values: int) -> float:
        """Return what radius and step are multiplied by, for images of so many values."""
        return values**0.5 if self.times_sqrt_d else 1.0

    def ball(self, batch: AttackBatch) -> tuple[Ball, float]:
        """Return the ball for images of a size, and the step size."""
        scale = self.scale(batch.images[0].numel())
        ball = Ball(self.norm, self.eps * scale, *batch.box, batch.threat.box_first, batch.representable)
        return ball, self.step_size * scale

    def perturb(self, batch: AttackBatch, restart: int = 0) -> Tensor:
        """Return the last iterates."""
        ball, step_size = self.ball(batch)
        start = ball.sample(batch.images, batch.seed, batch.indices, restart) if self.random_start else None
        gradient = None if self.random_start else batch.gradient
        return projected_gradient(
            batch.logits, batch.images, batch.labels, ball, step_size, self.steps, start, gradient
        )

    def settings(self) -> dict[str, Any]:
        """Return what decides the result, as plain values."""
        return {**super().settings(), "loss": "cross_entropy"}


@dataclass(frozen=True)
class TorchattacksAttack(Attack):
    """An attack of torchattacks, on pixels.

    Attributes:
        attack: the class.
        options: for its constructor.
        version: of torchattacks.
    """

    attack: str
    options: dict[str, Any] = field(default_factory=dict)
    version: str = ""

    @property
    def eps(self) -> float | None:
        """The radius, where it has one."""
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
        # a sample that was left alone comes back as it was, whatever the way there and back costs
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
    """Return the attacks called ``names``, one for each value of a sweep.

    Args:
        threat: gives what ``sweep`` does not.
        names: out of :data:`ATTACKS`, or ``torchattacks.…``.
        sweep: values of ``eps``, ``eps_l2`` and ``noise_std`` where there are several.
        restarts: of the attacks with a random start.
        options: for the constructors of torchattacks' attacks, by name.
        same_step: whether attacks in l∞ take the step size of ``threat`` for every radius; else it keeps its ratio.

    Raises:
        ConfigurationError: for unknown names and options.
    """
    idle = set(options or {}) - set(names)
    if idle:
        raise ConfigurationError(f"attack_options has an entry for {min(idle)!r}, which is not among attacks={names}.")
    for name in names:
        if name not in ATTACKS and not name.startswith(FOREIGN):
            raise ConfigurationError(
                f"attacks={shown(list(names))}: {name!r} is unknown; {nearest(name, ATTACKS)}, and any attack of "
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
    """Return one row for each radius, or a single one where the threat model does not decide it."""
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
    """Return the threat model's step, or one that is to ``eps`` as that is to its own radius."""
    return threat.step_size if same or eps == threat.eps else threat.step_size * eps / (threat.eps or 1.0)


def _swept(name: str, what: str, value: float, values: Sequence[float]) -> str:
    return name if len(values) == 1 else f"{name}_{what}{value:.4g}"
