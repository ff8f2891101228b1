"""Momentum buffers of one optimizer step, as needed for eq 16 extended to SGD with momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_normgeo.geometry.increments.momentum_increments import MomentumState
from lightning_normgeo.geometry.products.one_pass import many_weight_products
from lightning_normgeo.geometry.products.weight_pass import WeightPass, WeightProducts
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from lightning_normgeo.probes.explain import ReadPlan


def first_state(
    state: MomentumState, fresh: Sequence[bool], plans: Sequence[ReadPlan], products: Sequence[WeightProducts]
) -> MomentumState:
    """Return the momentum state, with values read from the buffers for weights that are counted for the first time.

    For all other weights the state has been advanced step by step with ⟨W, g⟩ = 0 (:func:`momentum_increment`).

    Args:
        state: ⟨W, b⟩ and ‖b‖² of each weight before the step.
        fresh: for each weight, whether no step has been counted yet.
        plans: one for each weight, all with the same rule.
        products: inner products of each weight in this step.

    Returns:
        The state with the entries of fresh weights replaced.
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
