"""Parameter groups of an optimizer by the role of the parameters in the scale symmetries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.normalization.user_inputs import check_module
from lightning_normgeo.utilities.checked_values import nearest, short_repr

ByRole = float | Mapping[str, float]
"""One number for all roles, or numbers by role."""
NONE = "none"
INVARIANT = ("invariant alone", "invariant jointly")
ALL_ROLES = (*INVARIANT, "rescaling", "without effect", NONE)


class WithRoles(Protocol):
    """Protocol of a result that knows the roles of the elements of each parameter."""

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters by name."""

    def role_masks(self, parameter: str) -> Mapping[str, npt.NDArray[np.bool_]]:
        """Return for each role a mask of the elements of a parameter that have it."""


def parameter_groups(
    symmetries: WithRoles,
    module: nn.Module,
    weight_decay: ByRole | None = None,
    lr: ByRole | None = None,
    corrected_decay: float | None = None,
) -> list[dict[str, Any]]:
    r"""Return the trainable parameters of a module in groups by role, for an optimizer.

    A parameter belongs to the role that most of its elements have: a packed projection of queries, keys and values is
    one parameter, and an optimizer cannot treat parts of it differently. Each parameter is in exactly one group;
    parameters that the search did not reach are in ``none``. Groups that would be empty are left out.

    Nothing is decided for you. Advice from the literature, for the roles ``invariant alone`` and ``invariant jointly``:

    - Decay sets only the length of these weights, and so how fast their direction turns (van Laarhoven 2017). Where the
      learning rate η falls, decay by ηλ lets the ratio ‖g‖/‖W‖ grow as :math:`\sqrt{2\lambda/\eta}`. AdamC (Defazio
      2025, arXiv 2506.02285) decays these weights by :math:`\lambda\eta^2/\eta_{\max}` instead. Pass η_max as
      ``corrected_decay`` and register :func:`correct_weight_decay` at the optimizer.
    - Hyperball (Wen et al. 2026, arXiv 2606.16899) holds the norm of weight matrices and of their updates. An option of
      a group cannot do that. These groups say which parameters it is meant for; give them ``weight_decay=0`` then.

    Args:
        symmetries: of the module, as from :func:`scale_symmetries`.
        module: the module.
        weight_decay: λ of all groups, or by role. Roles that are not named get the optimizer's default.
        lr: η of all groups, or by role. Roles that are not named get the optimizer's default.
        corrected_decay: η_max > 0, the largest learning rate of the schedule; needs a weight decay for the invariant
            roles. Default: decay as the optimizer does it.

    Returns:
        Dictionaries with ``params``, ``name``, and the options that were given.

    Raises:
        ConfigurationError: for an unknown role, a value that is not a number, and symmetries of another module.

    Example:
        >>> import torch
        >>> from lightning_normgeo import scale_symmetries
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
        >>> symmetries = scale_symmetries(network, torch.randn(8, 4))
        >>> groups = symmetries.parameter_groups(network, weight_decay={"invariant alone": 0.1, "rescaling": 0.0})
        >>> {group["name"]: group.get("weight_decay") for group in groups}
        {'invariant alone': 0.1, 'rescaling': 0.0, 'without effect': None, 'none': None}
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    check_module("parameter_groups(module)", module)
    options = {"weight_decay": _by_role("weight_decay", weight_decay), "lr": _by_role("lr", lr)}
    groups: dict[str, dict[str, Any]] = {
        role: {"params": [], "name": role, **{key: by[role] for key, by in options.items() if role in by}}
        for role in ALL_ROLES
    }
    if corrected_decay is not None:
        _add_correction(groups, corrected_decay)
    for name, parameter in by_clean_name(module.named_parameters()).items():
        if parameter.requires_grad:
            groups[_role_of(symmetries, name, parameter)]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def correct_weight_decay(optimizer: Optimizer, *_: Any) -> None:
    r"""Set the weight decay of groups with ``corrected_decay`` to λη/η_max, so that they decay by λη²/η_max.

    AdamC (Defazio 2025), for optimizers with decoupled weight decay. Register it once, and it runs before each step:
    ``optimizer.register_step_pre_hook(correct_weight_decay)``. Other groups are left as they are.

    Args:
        optimizer: with groups from :func:`parameter_groups`.
    """
    for group in optimizer.param_groups:
        if "peak_lr" in group:
            group["weight_decay"] = group["peak_weight_decay"] * float(group["lr"]) / group["peak_lr"]


def _role_of(symmetries: WithRoles, name: str, parameter: nn.Parameter) -> str:
    if name not in symmetries.parameters:
        return NONE
    shape = symmetries.parameters[name]
    if shape != tuple(parameter.shape):
        raise ConfigurationError(
            f"{name} has the shape {tuple(parameter.shape)}, and {shape} in the symmetries, which are of another "
            "module. Call scale_symmetries with this one."
        )
    counts = {role: int(mask.sum()) for role, mask in symmetries.role_masks(name).items()}
    return max(ALL_ROLES, key=lambda role: counts[role])


def _by_role(option: str, value: ByRole | None) -> dict[str, float]:
    if value is None:
        return {}
    by = dict(value) if isinstance(value, Mapping) else dict.fromkeys(ALL_ROLES, value)
    for role, number in by.items():
        if role not in ALL_ROLES:
            raise ConfigurationError(f"{option} has a value for the role {role!r}: {nearest(role, ALL_ROLES)}.")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < float("inf"):
            raise ConfigurationError(
                f"{option} is {short_repr(number)} for the role {role!r}. Give a finite number that is not negative."
            )
    return by


def _add_correction(groups: dict[str, dict[str, Any]], peak: float) -> None:
    if isinstance(peak, bool) or not isinstance(peak, (int, float)) or not 0 < peak < float("inf"):
        raise ConfigurationError(
            f"corrected_decay is {short_repr(peak)}. Give the largest learning rate of the schedule, a number above 0."
        )
    for role in INVARIANT:
        if "weight_decay" not in groups[role]:
            raise ConfigurationError(
                f"corrected_decay={peak} scales the weight decay of the role {role!r}, which was not given. Give "
                f"weight_decay={{{role!r}: …}}, or leave out corrected_decay."
            )
        groups[role] |= {"peak_lr": peak, "peak_weight_decay": groups[role]["weight_decay"]}
