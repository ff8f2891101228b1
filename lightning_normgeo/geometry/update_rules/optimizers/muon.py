"""Muon of torch, which orthogonalizes the momentum by Newton-Schulz iterations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.geometry.update_rules.elementwise import StepParts
from lightning_normgeo.geometry.update_rules.recipe import (
    Described,
    Group,
    Recipe,
    State,
    averages,
    recipe,
    scalar,
    shared,
)
from lightning_normgeo.geometry.update_rules.whole_tensor import Direction, WholeTensorRule, zeros_if_new


@dataclass(frozen=True, kw_only=True)
class MuonRule(WholeTensorRule):
    r"""torch.optim.Muon: W⁺ = sW - η'O with O close to the orthogonal matrix nearest to the momentum.

    O is recomputed by torch's Newton-Schulz iteration in bfloat16 (Jordan et al. 2024); s = 1 - ηλ, and η' is η,
    adjusted to the shape. All of the step counts as G, since O cannot be split. ⟨W, O⟩ is not zero for scale-invariant
    weights, and ‖O‖² is close to the rank of the momentum whatever ‖g‖ is, so eq 16 does not predict Muon. The state
    is (b⁻,), and empty before the first step.

    Args:
        momentum: μ. Default: 0.95.
        nesterov: whether the step averages g into the momentum once more. Default: True.
        coefficients: the three coefficients of the iteration.
        iterations: the number of iterations. Default: 5.
        eps: the smallest norm that is divided by. Default: 1e-7.
        adjusted: the ratio η'/η. Default: 1.
    """

    momentum: Scalar = 0.95
    nesterov: bool = True
    coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    iterations: int = 5
    eps: float = 1e-7
    adjusted: float = 1.0

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return the step η'O as the part G."""
        from torch.optim._muon import _zeropower_via_newtonschulz  # torch >= 2.9

        (buffer,) = zeros_if_new(state, gradient, 1)
        average = buffer.lerp(gradient, 1 - self.momentum)
        update = gradient.lerp(average, self.momentum) if self.nesterov else average
        turned = _zeropower_via_newtonschulz(update, self.coefficients, self.iterations, self.eps)
        return Direction(StepParts(turned.to(wide_dtype(weight.device)) * (self.lr * self.adjusted)))


def _muon(group: Group, state: State, dtype: torch.dtype) -> Described | None:
    (parameter,) = group["params"]
    rows, columns = parameter.shape
    adjusted = {
        None: math.sqrt(max(1, rows / columns)),
        "original": math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "spectral_unclamped": math.sqrt(rows / columns),
    }.get(group["adjust_lr_fn"])
    if adjusted is None:
        return None
    rule = MuonRule(
        **shared({**group, "decoupled_weight_decay": True}, dtype),
        momentum=scalar(group["momentum"]),
        nesterov=bool(group["nesterov"]),
        coefficients=tuple(group["ns_coefficients"]),
        iterations=group["ns_steps"],
        eps=group["eps"],
        adjusted=adjusted,
    )
    return rule, averages(state, "momentum_buffer")


_RECIPE = recipe(
    _muon, "lr weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn", always_decoupled=True
)
RECIPES: dict[str, Recipe] = {  # the module's name differs between versions of torch
    "torch.optim.Muon": _RECIPE,
    "torch.optim._muon.Muon": _RECIPE,
}
