"""The momentum buffers of a step, as far as eq 16's form for momentum needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.momentum_increments import MomentumState, momentum_increment
from lightning_normgeo.geometry.products.one_pass import many_weight_products
from lightning_normgeo.geometry.products.weight_pass import WeightPass, WeightProducts
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from lightning_normgeo.probes.explain import ReadPlan


def first_state(
    state: MomentumState, fresh: Sequence[bool], plans: Sequence[ReadPlan], products: Sequence[WeightProducts]
) -> MomentumState:
    """Return the state with the buffers read themselves of weights that are counted for the first time.

    Args:
        state: of the weights.
        fresh: which of them no step was counted of yet.
        plans: one for each weight, all with the same rule.
        products: what was read of them.
    """
    rule = plans[0].reads.rule
    if not any(fresh) or not isinstance(rule, SGDRule) or not plans[0].reads.state:
        return state
    buffers = [planned.reads.state[0] for planned in plans]
    squares = many_weight_products([WeightPass(buffer, buffer) for buffer in buffers])
    inner, square = list(state.inner), list(state.square)
    for k, new in enumerate(fresh):
        if new:
            inner[k], square[k] = products[k].rule[0].sum(), squares[k].weight_sq.sum()
    return MomentumState(torch.stack(inner), torch.stack(square))


def next_state(
    plans: Sequence[ReadPlan], products: Sequence[WeightProducts], state: MomentumState
) -> tuple[Tensor, MomentumState] | None:
    """Return the increments that follow from ⟨W, g⟩ = 0 and the state after the step; None unless the rule is SGD's."""
    rule = plans[0].reads.rule
    if not isinstance(rule, SGDRule):
        return None
    weight_sq, gradient_sq = (
        torch.stack([getattr(read, name).sum() for read in products]) for name in ("weight_sq", "gradient_sq")
    )
    direction_sq = torch.stack([read.rule[1].sum() for read in products]) if products[0].rule else None
    return momentum_increment(rule, weight_sq, gradient_sq, direction_sq, state)
