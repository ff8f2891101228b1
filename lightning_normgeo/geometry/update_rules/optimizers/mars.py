"""MARS, which is Adam or Lion with a variance-reduced gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.geometry.update_rules.elementwise import StepParts, average
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule
from lightning_normgeo.geometry.update_rules.recipe import Described, Group, Recipe, State, averages, moments, recipe
from lightning_normgeo.geometry.update_rules.timm_options import ADAM_STATE, with_decoupled_decay
from lightning_normgeo.geometry.update_rules.whole_tensor import Direction, WholeTensorRule, masked, scaled


@dataclass(frozen=True, kw_only=True)
class MarsRule(WholeTensorRule, AdamRule):
    r"""MARS as in timm: Adam or Lion of c = g + γβ₁/(1-β₁)(g - g⁻), clipped to ‖c‖ ≤ 1 (Yuan et al. 2024).

    W⁺ = W - η(λW + A) with A = m̂/(√v̂ + ε) or sign(m). G is the part that comes from c. The state is (m⁻, v⁻, g⁻), and
    empty before the first step, where c = g.

    Args:
        gamma: γ; None where c = g without clipping, as for vectors. Default: 0.025.
        sign: whether A is that of Lion. Default: False, that of Adam.
        caution: whether m is masked, see :class:`CautiousRule`. Default: False.
    """

    gamma: float | None = 0.025
    sign: bool = False
    caution: bool = False

    @property
    def stores(self) -> int:
        """The number of times that one step stores the weight: once, since decay is part of the same subtraction."""
        return 1

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return the parts G and M."""
        wide, (beta1, beta2) = wide_dtype(weight.device), self.betas
        change, g = self._change(gradient, *state).to(wide), gradient.to(wide)
        first, second = (tensor.to(wide) for tensor in state[:2]) if state else (None, None)
        parts = StepParts(change * (1 - beta1), None if first is None else first * beta1)
        whole = parts.gradient if parts.momentum is None else parts.gradient + parts.momentum
        if self.sign:
            moves = whole * g > 0 if self.caution else whole != 0
            by = torch.where(moves, whole.abs(), torch.inf)
        else:
            parts = masked(parts, g) if self.caution else parts
            by = (average(second, change.square(), beta2) / (1 - beta2**self.step)).sqrt() + self.eps
            by = by * (1 - beta1**self.step)
        return Direction(scaled(parts, self.lr / by))

    def _change(self, gradient: Tensor, *state: Tensor) -> Tensor:
        """Return c, computed in the precision of the optimizer."""
        if self.gamma is None:
            return gradient
        beta1 = self.betas[0]
        change: Tensor = gradient
        if state:
            change = (gradient - state[2]).mul_(self.gamma * (beta1 / (1.0 - beta1))).add_(gradient)
        length: Tensor = torch.norm(change)
        return change / length.clamp_(min=1.0)


def _mars(group: Group, state: State, dtype: torch.dtype) -> Described:
    (parameter,) = group["params"]
    mixed = group["optimize_1d"] or parameter.ndim >= 2
    seen = group if mixed else {**group, "lr": group["lr"] * group["lr_1d_factor"], "betas": group["betas_1d"]}
    rule = MarsRule(
        **with_decoupled_decay(seen, dtype, True),
        **moments(seen, state),
        gamma=group["gamma"] if mixed else None,
        sign=bool(mixed and group["mars_type"] == "lion"),
        caution=bool(group.get("caution", False)),
    )
    return rule, averages(state, *ADAM_STATE, "last_grad")


RECIPES: dict[str, Recipe] = {
    "timm.optim.mars.Mars": recipe(
        _mars, "lr betas eps weight_decay gamma mars_type optimize_1d lr_1d_factor betas_1d caution"
    ),
}
