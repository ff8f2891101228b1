"""Adafactor of torch, which keeps the second moments of a matrix as an outer product."""

from __future__ import annotations

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
from lightning_normgeo.geometry.update_rules.whole_tensor import Direction, WholeTensorRule, least, own_norm


@dataclass(frozen=True, kw_only=True)
class AdafactorRule(WholeTensorRule):
    r"""torch.optim.Adafactor: steps proportional to rms(W), with a v of rank one (Shazeer & Stern 2018).

    G = α g/√v̂ / max(1, rms(g/√v̂)/d), α = max(ε₂, rms(W)) min(η, 1/√t). The state is (r⁻, c⁻), the means over rows
    and columns, for a matrix, (v⁻,) for a vector, and empty before the first step.

    Args:
        decay: the exponent of t that gives 1 - β₂. Default: -0.8.
        eps: (ε₁, ε₂).
        clip: d. Default: 1.
        step: number t of this step, from 1.
    """

    decay: float = -0.8
    eps: tuple[float, float] = (1e-8, 1e-3)
    clip: float = 1.0
    step: Scalar = 1.0

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return the part G, by the same operations as in torch, in the optimizer's precision."""
        gradient = -gradient if self.maximize else gradient
        size = weight.numel() ** 0.5
        update = self._estimate(gradient, *state).clamp_(min=self.eps[0] ** 2).rsqrt_().mul_(gradient)
        rate = least(self.lr, 1 / self.step**0.5) * (own_norm(weight) / size).clamp_min(self.eps[1])
        by = (own_norm(update) / (size * self.clip)).clamp_min(1.0)
        return Direction(StepParts(update.to(wide_dtype(weight.device)) * (rate / by)))

    def _estimate(self, gradient: Tensor, *state: Tensor) -> Tensor:
        """Return v̂, of the shape of the gradient."""
        share = self.step**self.decay
        if gradient.dim() < 2:
            before = state[0] if state else torch.zeros_like(gradient)
            return before.lerp(gradient * gradient, share)
        row, column = (
            torch.linalg.vector_norm(gradient, dim=dim, keepdim=True).square_().div_(gradient.size(dim))
            for dim in (-1, -2)
        )
        rows, columns = state or (torch.zeros_like(row), torch.zeros_like(column))
        rows, columns = rows.lerp(row, share), columns.lerp(column, share)
        return (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=self.eps[0]))


def _adafactor(group: Group, state: State, dtype: torch.dtype) -> Described:
    (parameter,) = group["params"]
    eps = group["eps"][0]
    rule = AdafactorRule(
        **shared({**group, "decoupled_weight_decay": True}, dtype),
        decay=group["beta2_decay"],
        eps=(torch.finfo(dtype).eps if eps is None else eps, group["eps"][1]),
        clip=group["d"],
        step=scalar(state["step"] + 1 if state else 1.0),
    )
    return rule, averages(state, *(["row_var", "col_var"] if parameter.ndim > 1 else ["variance"]))


_RECIPE = recipe(_adafactor, "lr beta2_decay eps d weight_decay maximize", always_decoupled=True)
RECIPES: dict[str, Recipe] = {  # the module's name differs between versions of torch
    "torch.optim.Adafactor": _RECIPE,
    "torch.optim._adafactor.Adafactor": _RECIPE,
}
