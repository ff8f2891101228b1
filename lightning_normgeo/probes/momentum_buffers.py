"""Momentum buffers of one optimizer step, as needed for eq 16 extended to SGD with momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_normgeo.geometry.columns import run_sums
from lightning_normgeo.geometry.increments.momentum_increments import MomentumState, momentum_increment
from lightning_normgeo.geometry.products.one_pass import many_weight_products
from lightning_normgeo.geometry.products.weight_pass import WeightPass, WeightProducts
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from lightning_normgeo.probes.explain import ReadPlan


def first_state(
    state: MomentumState, fresh: Sequence[bool], plans: Sequence[ReadPlan], products: Sequence[WeightProducts]
) -> MomentumState:
    """Return the momentum state, with values read from the buffers for weights that are counted for the first time.

    For all other weights the state has been advanced step by step with ⟨W, g⟩ = 0 (:func:`next_state`).

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


def next_state(
    plans: Sequence[ReadPlan], products: Sequence[WeightProducts], state: MomentumState
) -> tuple[Tensor, MomentumState] | None:
    """Return the increments of ‖W‖² that follow from ⟨W, g⟩ = 0, and the momentum state after the step.

    Args:
        plans: one for each weight, all with the same rule.
        products: inner products of each weight in this step.
        state: ⟨W, b⟩ and ‖b‖² of each weight before the step.

    Returns:
        The increments, one per weight in units of weight², and the new state; None if the rule is not that of SGD.
    """
    rule = plans[0].reads.rule
    if not isinstance(rule, SGDRule):
        return None
    rows = [len(read.weight_sq) for read in products]
    weight_sq = run_sums(torch.cat([read.weight_sq for read in products]), rows)
    gradient_sq = run_sums(torch.cat([read.gradient_sq for read in products]), rows)
    direction_sq = run_sums(torch.cat([read.rule[1] for read in products]), rows) if products[0].rule else None
    return momentum_increment(rule, weight_sq, gradient_sq, direction_sq, state)
