"""Registry of attacks: from names and settings to one attack for each row of the results."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.attack import Attack, AttackBatch, Noise
from lightning_normgeo.robustness.attacks.ball import per_image
from lightning_normgeo.robustness.attacks.native_attacks import AutoPGD, ProjectedGradient, SquareSearch
from lightning_normgeo.robustness.attacks.requests import FOREIGN, Request, requests
from lightning_normgeo.robustness.attacks.torchattacks_attack import check_torchattacks, torchattacks_attack
from lightning_normgeo.robustness.threat_model import ThreatModel
from lightning_normgeo.utilities.checked_values import short_repr

DEFAULT_ATTACKS = ("gaussian", "bim")
"""Attacks that are evaluated unless others are named."""
_STEPS, _QUERIES, _SHARE, _TARGETS = 100, 5000, 0.8, 9
"""Published defaults: steps of APGD and FAB, queries and first share of Square, and classes that are aimed at."""


@dataclass(frozen=True, kw_only=True)
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

    @property
    def norm(self) -> str:
        """Norm of the radius."""
        return "l2" if self.options.get("norm") == "L2" else "linf"

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


@dataclass(frozen=True)
class Defaults:
    """Settings of an evaluation that hold for attacks without settings of their own.

    Attributes:
        threat: the threat model.
        sweep: several values for any of ``eps``, ``eps_l2`` and ``noise_std``.
        restarts: number of random starts of PGD.
        options: constructor arguments of torchattacks' attacks, by name of the attack.
        same_step: whether attacks in l∞ use the threat model's step size for every radius. Default: the step size keeps
            its ratio to the radius.
    """

    threat: ThreatModel
    sweep: Mapping[str, Sequence[float]] = field(default_factory=dict)
    restarts: int = 1
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    same_step: bool = False

    def radii(self, norm: str) -> Sequence[float]:
        """Return the radii in a norm."""
        if norm == "l2":
            return self.sweep.get("eps_l2", [self.threat.eps if self.threat.eps_l2 is None else self.threat.eps_l2])
        return self.sweep.get("eps", [self.threat.eps])


def attack_list(names: Sequence[Any], defaults: Defaults) -> list[Attack]:
    """Return the attacks that were asked for, with one attack for each value of a sweep.

    Args:
        names: see :func:`.requests`.
        defaults: settings for attacks without settings of their own.

    Raises:
        ConfigurationError: for unknown names and settings.
    """
    asked = requests(names)
    unused = set(defaults.options) - {request.name for request in asked}
    if unused:
        raise ConfigurationError(
            f"attack_options has an entry for {min(unused)!r}, which is not among attacks={short_repr(list(names))}."
        )
    return [attack for request in asked for attack in _attacks(request, defaults)]


def _attacks(request: Request, defaults: Defaults) -> list[Attack]:
    """Return the attacks of one request, one for each value of a sweep."""
    if request.kind.startswith(FOREIGN):
        return _foreign(request, defaults)
    if request.name in defaults.options:
        raise ConfigurationError(
            f"attack_options[{request.name!r}]: only attacks of torchattacks take them. Give its settings with its "
            f"name: attacks=[{{'name': {request.name!r}, …}}]."
        )
    if request.kind == "gaussian":
        stds = request.options.get("std", defaults.sweep.get("noise_std", [defaults.threat.noise_std]))
        stds = stds if isinstance(stds, (list, tuple)) else [stds]
        clip = defaults.threat.clip_noise
        return [Noise(_swept(request.name, "std", std, stds), std=std, clip=clip) for std in stds]
    radii = request.radii(defaults.radii(request.norm))
    _check_radii(request, radii, defaults.threat)
    builders = {"bim": _projected, "pgd": _projected, "apgd": _auto, "square": _square, "standard": _standard}
    build = builders[request.kind]
    return [
        attack for eps in radii for attack in build(request, _swept(request.name, "eps", eps, radii), eps, defaults)
    ]


def _check_radii(request: Request, radii: Sequence[float], threat: ThreatModel) -> None:
    """Refuse radii beyond the range of pixels, which are probably in steps of 8-bit pixels."""
    if request.norm == "linf" and "eps" in request.options and threat.space == "pixel" and max(radii) > 1:
        raise ConfigurationError(
            f"attacks: {request.name!r} has eps={max(radii)!r}, larger than the pixel range [0, 1]. Did you mean "
            f"{max(radii):g}/255 = {max(radii) / 255:.4f}?"
        )


def _ball(request: Request, name: str, eps: float, defaults: Defaults) -> dict[str, Any]:
    """Return the settings that all attacks within a ball have."""
    own = request.options
    no_radius = "eps" not in own and "eps_l2" not in defaults.sweep and defaults.threat.eps_l2 is None
    return {
        "name": name,
        "norm": request.norm,
        "eps": eps,
        "times_sqrt_d": request.norm == "l2" and no_radius,
        "loss": own.get("loss", "cross_entropy"),
        "targets": own.get("targets", 0),
        "restarts": own.get("restarts", 1),
        "eot": own.get("eot", 1),
        "bisections": own.get("bisections", 0),
    }


def _projected(request: Request, name: str, eps: float, defaults: Defaults) -> list[Attack]:
    own, ball = request.options, _ball(request, name, eps, defaults)
    random_start = request.kind == "pgd"
    if random_start:
        ball["restarts"] = own.get("restarts", defaults.restarts)
    size = own.get("step_size", step_size(defaults.threat, eps, defaults.same_step and request.norm == "linf"))
    steps = own.get("steps", defaults.threat.steps)
    return [ProjectedGradient(**ball, step_size=size, steps=steps, random_start=random_start)]


def _auto(request: Request, name: str, eps: float, defaults: Defaults) -> list[Attack]:
    own, ball = request.options, _ball(request, name, eps, defaults)
    size = step_size(defaults.threat, eps, defaults.same_step and request.norm == "linf")
    # a targeted loss has no BIM to be compared with
    bim_steps = own.get("bim_steps", 0 if ball["targets"] else defaults.threat.steps)
    first = {"bim_steps": bim_steps, "bim_step_size": size} if bim_steps else {}
    return [AutoPGD(**ball, steps=own.get("steps", _STEPS), **first)]


def _square(request: Request, name: str, eps: float, defaults: Defaults) -> list[Attack]:
    own, ball = request.options, _ball(request, name, eps, defaults)
    ball["loss"] = own.get("loss", "margin")
    return [SquareSearch(**ball, queries=own.get("queries", _QUERIES), share=own.get("share", _SHARE))]


def _standard(request: Request, name: str, eps: float, defaults: Defaults) -> list[Attack]:
    """Return the parts of AutoAttack's standard version (Croce and Hein 2020), each for what the last did not break."""
    if defaults.threat.space != "pixel" or _ball(request, name, eps, defaults)["times_sqrt_d"]:
        raise ConfigurationError(
            f"attacks: {request.name!r} is published for pixels in [0, 1]: choose a preset in pixels, as 'pixel-8-255'."
        )
    ball: dict[str, Any] = {"norm": request.norm, "eps": eps}
    foreign = {"norm": "L2" if request.norm == "l2" else "Linf", "eps": eps, "n_restarts": 1, "verbose": False}
    names = [f"{name}-{part}" for part in ("apgd-ce", "apgd-t", "fab-t")]
    fab = {**foreign, "steps": _STEPS, "multi_targeted": True}
    parts: list[Attack] = [
        AutoPGD(names[0], **ball, steps=_STEPS),
        AutoPGD(names[1], names[0], **ball, steps=_STEPS, loss="dlr", targets=_TARGETS),
        _torchattacks(names[2], names[1], "FAB", defaults.threat, fab),
    ]
    if request.norm == "linf":
        square = SquareSearch(name, names[2], **ball, loss="margin", queries=_QUERIES, share=_SHARE)
        return [*parts, square]
    queries = {**foreign, "n_queries": _QUERIES}
    return [*parts, _torchattacks(name, names[2], "Square", defaults.threat, queries)]


def _torchattacks(
    name: str, after: str | None, attack: str, threat: ThreatModel, options: Mapping[str, Any]
) -> TorchattacksAttack:
    arguments = check_torchattacks(attack, threat, options)
    version = importlib.metadata.version("torchattacks")
    return TorchattacksAttack(name, after, attack=attack, options=arguments, version=version)


def _foreign(request: Request, defaults: Defaults) -> list[Attack]:
    """Return torchattacks' attack for each radius, or one attack if its arguments do not depend on the radius."""
    attack = request.kind.removeprefix(FOREIGN)
    options = {**request.options, **defaults.options.get(request.name, {})}
    given: Any = options.get("eps")
    swept = isinstance(given, (list, tuple))
    radii = list(given if swept else defaults.sweep.get("eps", [defaults.threat.eps]))
    own = [{**options, "eps": eps} if swept else options for eps in radii]
    threats = [
        replace(defaults.threat, eps=eps, step_size=step_size(defaults.threat, eps, defaults.same_step))
        for eps in radii
    ]
    chosen = [check_torchattacks(attack, one, given) for one, given in zip(threats, own, strict=True)]
    if all(one == chosen[0] for one in chosen):
        radii, chosen = radii[:1], chosen[:1]
    version = importlib.metadata.version("torchattacks")
    return [
        TorchattacksAttack(_swept(request.name, "eps", eps, radii), attack=attack, options=arguments, version=version)
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
