"""Builders of attacks: from a request to the attacks of its kind at one radius."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.attack import Attack, Noise
from lightning_normgeo.robustness.attacks.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from lightning_normgeo.robustness.attacks.foreign_attack import foreign_attack
from lightning_normgeo.robustness.attacks.native_attacks import (
    AutoPGD,
    ProjectedGradient,
    RandomSearch,
    SquareSearch,
    Transfer,
)
from lightning_normgeo.robustness.attacks.requests import FOREIGN, Request
from lightning_normgeo.robustness.threat_models import ThreatModel

_STEPS, _QUERIES, _SHARE, _TARGETS = 100, 5000, 0.8, 9
"""Published defaults: steps of APGD and FAB, queries and first share of Square, and classes that are aimed at."""
_UNBOUNDED = 1e3
"""Radius of an attack without a bound, over the radius of the others: only the box of images limits it."""
ITERATIVE, SINGLE_STEP, RANDOM, UNBOUNDED = "iterative", "single step", "random search", "unbounded"
"""Roles of attacks in the sanity checks."""


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


def noises(request: Request, defaults: Defaults) -> list[Attack]:
    """Return the attacks of a request for Gaussian noise."""
    stds = request.many("std", defaults.sweep.get("noise_std", [defaults.threat.noise_std]))
    clip = defaults.threat.clip_noise
    return [Noise(swept(request.name, "std", std, stds), std=std, clip=clip) for std in stds]


def corruptions(request: Request) -> list[Attack]:
    """Return the attacks of a request for corruptions, one for each kind and severity."""
    kinds, severities = request.many("kinds", list(CORRUPTIONS)), request.many("severities", SEVERITIES)
    return [
        Corruption(f"{request.name}-{kind}_s{k}", corruption=kind, severity=k, amount=CORRUPTIONS[kind].amounts[k - 1])
        for kind in kinds
        for k in severities
    ]


def _transfer(request: Request, name: str, eps: float, defaults: Defaults) -> list[Attack]:
    (source,) = _projected(request, name, eps, defaults)
    assert isinstance(source, ProjectedGradient)  # noqa: S101
    return [Transfer(name, source=source)]


def _sanity(request: Request, name: str, eps: float, defaults: Defaults) -> list[Attack]:
    """Return the attacks of the sanity checks: iterative and single step, random search, and without a bound."""
    ball = {key: value for key, value in _ball(request, name, eps, defaults).items() if key != "name"}
    plain = {**ball, "random_start": False}
    size = step_size(defaults.threat, eps, defaults.same_step and request.norm == "linf")
    wide = {**plain, "eps": _UNBOUNDED * eps, "step_size": 4 * size, "steps": _STEPS}
    return [
        ProjectedGradient(f"{name}-iterative", role=ITERATIVE, **plain, step_size=size, steps=defaults.threat.steps),
        ProjectedGradient(f"{name}-single-step", role=SINGLE_STEP, **plain, step_size=eps, steps=1),
        RandomSearch(f"{name}-random", role=RANDOM, **ball, points=_STEPS),
        ProjectedGradient(f"{name}-unbounded", role=UNBOUNDED, **wide),
    ]


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
        foreign_attack(names[2], names[1], "FAB", defaults.threat, fab),
    ]
    if request.norm == "linf":
        square = SquareSearch(name, names[2], **ball, loss="margin", queries=_QUERIES, share=_SHARE)
        return [*parts, square]
    queries = {**foreign, "n_queries": _QUERIES}
    return [*parts, foreign_attack(name, names[2], "Square", defaults.threat, queries)]


def foreign(request: Request, defaults: Defaults) -> list[Attack]:
    """Return torchattacks' attack for each radius, or one attack if its arguments do not depend on the radius."""
    attack = request.kind.removeprefix(FOREIGN)
    options = {**request.options, **defaults.options.get(request.name, {})}
    given: Any = options.get("eps")
    several = isinstance(given, (list, tuple))
    radii = list(given if several else defaults.sweep.get("eps", [defaults.threat.eps]))
    own = [{**options, "eps": eps} if several else options for eps in radii]
    threats = [
        replace(defaults.threat, eps=eps, step_size=step_size(defaults.threat, eps, defaults.same_step))
        for eps in radii
    ]
    chosen = [foreign_attack(request.name, None, attack, one, given) for one, given in zip(threats, own, strict=True)]
    if all(one == chosen[0] for one in chosen):
        radii, chosen = radii[:1], chosen[:1]
    return [replace(one, name=swept(request.name, "eps", eps, radii)) for one, eps in zip(chosen, radii, strict=True)]


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


def swept(name: str, what: str, value: float, values: Sequence[float]) -> str:
    """Return the name of a row, with the value of the setting ``what`` if there are several."""
    return name if len(values) == 1 else f"{name}_{what}{value:.4g}"


BUILDERS: dict[str, Callable[[Request, str, float, Defaults], list[Attack]]] = {
    "bim": _projected,
    "pgd": _projected,
    "apgd": _auto,
    "square": _square,
    "standard": _standard,
    "transfer": _transfer,
    "sanity": _sanity,
}
"""Builders of the attacks within a ball, by kind."""
