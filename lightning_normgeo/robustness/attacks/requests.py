"""Attacks as they are asked for: by name, or by name with settings of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.corruptions import CORRUPTIONS, SEVERITIES
from lightning_normgeo.robustness.attacks.search.losses import LOSSES
from lightning_normgeo.utilities.attack_names import RESERVED
from lightning_normgeo.utilities.checked_values import entry_of, is_number, nearest, plain_values, short_repr, whole

FOREIGN = "torchattacks."
"""Prefix of the names of torchattacks' attacks."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Request:
    """An attack that was asked for.

    Attributes:
        name: the name of its rows.
        kind: the kind of attack: a name of :data:`KINDS`, or ``torchattacks.<name>``.
        norm: norm of the ball, ``linf`` or ``l2``.
        options: its own settings.
    """

    name: str
    kind: str
    norm: str
    options: dict[str, Any]

    def many(self, setting: str, default: Sequence[Any]) -> list[Any]:
        """Return the values of a setting, one or several, or the default."""
        given = self.options.get(setting, list(default))
        return list(given) if isinstance(given, (list, tuple)) else [given]

    def refuse(self, setting: str, allowed: str) -> ConfigurationError:
        """Return the error for a value of one of the settings."""
        given = short_repr(self.options[setting])
        return ConfigurationError(f"attacks: {self.name!r} has {setting}={given}, which must be {allowed}.")


def _radius(request: Request, name: str) -> None:
    values = request.options[name]
    values = values if isinstance(values, (list, tuple)) else [values]
    good = values and all(is_number(value) and 0 <= value < float("inf") for value in values)
    if not good or len(set(values)) < len(values):
        raise request.refuse(name, "a number, at least 0 and finite, or a list of different ones, in units of space")


def _number(request: Request, name: str) -> None:
    value = request.options[name]
    if not (is_number(value) and 0 < value < float("inf")):
        raise request.refuse(name, "a positive number")


def _share(request: Request, name: str) -> None:
    value = request.options[name]
    if not (is_number(value) and 0 < value <= 1):
        raise request.refuse(name, "a number in (0, 1]")


def _count(request: Request, name: str) -> None:
    whole(f"attacks: {request.name!r}: {name}", request.options[name], 1)


def _count_or_none(request: Request, name: str) -> None:
    whole(f"attacks: {request.name!r}: {name}", request.options[name], 0)


def _loss(request: Request, name: str) -> None:
    entry_of(f"attacks: {request.name!r}: {name}", request.options[name], LOSSES)


def _names(request: Request, name: str) -> None:
    for kind in request.many(name, []):
        entry_of(f"attacks: {request.name!r}: {name}", kind, CORRUPTIONS)


def _severities(request: Request, name: str) -> None:
    if not request.many(name, []) or not set(request.many(name, [])) <= set(SEVERITIES):
        raise request.refuse(name, "one or several of 1, 2, 3, 4, 5")


def _norm(request: Request, name: str) -> None:
    if request.options[name] not in _NORMS:
        raise request.refuse(name, "'linf' or 'l2'")


_Check = Callable[[Request, str], None]
_BALL: dict[str, _Check] = {
    "eps": _radius,
    "norm": _norm,
    "loss": _loss,
    "targets": _count_or_none,
    "bisections": _count_or_none,
}
KINDS: dict[str, dict[str, _Check]] = {
    "gaussian": {"std": _radius},
    "bim": {**_BALL, "steps": _count, "step_size": _number, "eot": _count},
    "pgd": {**_BALL, "steps": _count, "step_size": _number, "eot": _count, "restarts": _count},
    "apgd": {**_BALL, "steps": _count, "eot": _count, "restarts": _count, "bim_steps": _count_or_none},
    "square": {
        "eps": _radius,
        "loss": _loss,
        "queries": _count,
        "share": _share,
        "restarts": _count,
        "bisections": _count_or_none,
    },
    "standard": {"eps": _radius, "norm": _norm},
    "transfer": {**_BALL, "steps": _count, "step_size": _number},
    "corruptions": {"kinds": _names, "severities": _severities},
    "sanity": {"eps": _radius, "norm": _norm},
}
"""The settings of each kind of attack, with their checks."""
ATTACKS = (*KINDS, "bim_l2", "pgd_l2", "apgd_l2", "standard_l2", "transfer_l2", "sanity_l2")
"""Names of the attacks, besides ``torchattacks.<name>``; ``clean`` is always evaluated."""


def requests(attacks: Sequence[Any]) -> list[Request]:
    """Return the attacks that were asked for.

    Args:
        attacks: names out of :data:`ATTACKS` or ``torchattacks.<name>``; or dictionaries with ``name``, ``attack`` for
            the kind if the name is another, and settings.

    Raises:
        ConfigurationError: for unknown names and settings, and for values that are not allowed.
    """
    return [_request(entry, list(attacks)) for entry in attacks]


def _request(entry: Any, attacks: list[Any]) -> Request:
    options = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name = options.pop("name", options.get("attack"))
    kind = options.pop("attack", name)
    if not isinstance(name, str) or not isinstance(kind, str):
        raise ConfigurationError(
            f"attacks={short_repr(attacks)}: {short_repr(entry)} must be the name of an attack, as 'bim', or a "
            "dictionary with its name and settings, as {'name': 'apgd', 'loss': 'dlr'}."
        )
    if kind not in ATTACKS and not kind.startswith(FOREIGN):
        raise ConfigurationError(
            f"attacks={short_repr(attacks)}: {kind!r} is unknown; {nearest(kind, ATTACKS)}, and any attack of "
            "torchattacks as 'torchattacks.…'."
        )
    _check_name(name)
    options = {key: plain_values(value) for key, value in options.items()}
    if kind.startswith(FOREIGN):
        return Request(name, kind, "l2" if options.get("norm") == "L2" else "linf", options)
    base = kind.removesuffix("_l2")
    request = Request(name, base, "l2" if kind != base else options.get("norm", "linf"), options)
    _check_options(request)
    if kind != base and options.get("norm", "l2") != "l2":
        raise request.refuse("norm", f"'l2' for {kind!r}; ask for {base!r}")
    if request.norm == "l2" and "_l2" not in name:
        request = Request(f"{name}_l2", base, "l2", options)
    return request


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or any(re.fullmatch(pattern, name) for pattern in RESERVED):
        raise ConfigurationError(
            f"attacks: the name {short_repr(name)} becomes part of keys and files: use letters, digits, '.', '-' and "
            "'_', and none of 'clean', 'worst', '…_eps0.1' and '…_rescaled', which have a meaning."
        )


def _check_options(request: Request) -> None:
    checks = KINDS[request.kind]
    for name in request.options:
        if name not in checks:
            raise ConfigurationError(
                f"attacks: {request.name!r} has no setting {name!r}; {nearest(name, checks)}"
                f"{', and name and attack' if checks else ''}."
            )
        checks[name](request, name)
