"""Registry of attacks: from names and settings to one attack for each row of the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.attack import Attack
from lightning_normgeo.robustness.attacks.builders import BUILDERS, Defaults, corruptions, foreign, noises, swept
from lightning_normgeo.robustness.attacks.requests import FOREIGN, Request, requests
from lightning_normgeo.robustness.threat_models import ThreatModel
from lightning_normgeo.utilities.checked_values import short_repr

DEFAULT_ATTACKS = ("gaussian", "bim")
"""Attacks that are evaluated unless others are named."""


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
        return foreign(request, defaults)
    if request.name in defaults.options:
        raise ConfigurationError(
            f"attack_options[{request.name!r}]: only attacks of torchattacks take them. Give its settings with its "
            f"name: attacks=[{{'name': {request.name!r}, …}}]."
        )
    if request.kind == "gaussian":
        return noises(request, defaults)
    if request.kind == "corruptions":
        return corruptions(request)
    radii = request.many("eps", defaults.radii(request.norm))
    _check_radii(request, radii, defaults.threat)
    rows = [(swept(request.name, "eps", eps, radii), eps) for eps in radii]
    return [attack for name, eps in rows for attack in BUILDERS[request.kind](request, name, eps, defaults)]


def _check_radii(request: Request, radii: Sequence[float], threat: ThreatModel) -> None:
    """Refuse radii beyond the range of pixels, which are probably in steps of 8-bit pixels."""
    if request.norm == "linf" and "eps" in request.options and threat.space == "pixel" and max(radii) > 1:
        raise ConfigurationError(
            f"attacks: {request.name!r} has eps={max(radii)!r}, larger than the pixel range [0, 1]. Did you mean "
            f"{max(radii):g}/255 = {max(radii) / 255:.4f}?"
        )
