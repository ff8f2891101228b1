"""Explanation of a step by the optimizer's formula, for all weights that one rule moves at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms, Scalar, UpdateRule
from lightning_normgeo.geometry.increments.norm_increments import predicted_increment
from lightning_normgeo.geometry.products.one_pass import is_additive
from lightning_normgeo.geometry.products.weight_pass import WeightPass, WeightProducts
from lightning_normgeo.geometry.rows import is_sharded, on_observing_device
from lightning_normgeo.geometry.update_rules.decoupled_decay import shrink_of
from lightning_normgeo.geometry.update_rules.recipe import Group, scalar
from lightning_normgeo.geometry.update_rules.registry import described_safely, warn_unexplained
from lightning_normgeo.geometry.update_rules.whole_tensor import WholeTensorRule, whole_products


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yield the parameters of an optimizer."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def groups_of(optimizer: Optimizer) -> dict[int, Group]:
    """Return the parameter group of each parameter, by its id."""
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """Return the factor that scales the gradients, or None: fused optimizers unscale them inside their step."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return None if scale is None else on_observing_device(scale)


def learning_rate(group: Group) -> Scalar:
    """Return the current η of a parameter group, NaN if it has none; a scheduler changes it right after the step."""
    return scalar(group.get("lr", math.nan))


def decay_factor(optimizer: Optimizer, group: Group) -> Scalar:
    """Return the factor s of decoupled decay; 1 if the group lacks an option that its optimizer has."""
    try:
        return shrink_of(optimizer, group)
    except Exception:
        return 1.0


def arithmetic_of(rule: UpdateRule | None, dtype: torch.dtype) -> torch.dtype:
    """Return the coarsest dtype that an optimizer computes in: the weight's, or that of a learning rate in a tensor."""
    return max(dtype, getattr(rule, "dtype", dtype), key=lambda one: torch.finfo(one).eps)


class ReadPlan(NamedTuple):
    """One parameter to read before its update."""

    dtype: torch.dtype
    lr: Scalar
    reads: WeightPass

    @property
    def arithmetic(self) -> torch.dtype:
        """The coarsest dtype that the optimizer computes in."""
        return arithmetic_of(self.reads.rule, self.dtype)


class ParameterReading(NamedTuple):
    """A parameter that was read before its update."""

    plan: ReadPlan
    products: WeightProducts


class GroupTerms(NamedTuple):
    """Terms of several parameters that one rule moves, one value per row over all of them."""

    weight_sq: Tensor
    inner: Tensor
    gradient_sq: Tensor
    quartic: Tensor
    predicted: Tensor
    terms: IncrementTerms | None
    products: tuple[Tensor, ...]
    """The results of ``rule.products``; empty without a rule."""


def plan(
    parameter: nn.Parameter,
    rows: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    group: Group,
    keep: Tensor | None = None,
    finer: Callable[[Tensor], Tensor] | None = None,
) -> ReadPlan:
    """Plan how to read a parameter.

    Args:
        parameter: with a gradient.
        rows: views a tensor of its shape with one unit per row.
        optimizer: about to move it.
        group: the parameter's.
        keep: takes a copy of its rows.
        finer: views a tensor with several rows for each unit, in order. It is used instead of ``rows`` where products
            of rows add up to those of units. Default: none.
    """
    assert parameter.grad is not None  # noqa: S101
    described = described_safely(optimizer, group, optimizer.state.get(parameter, {}), parameter)
    rule, state = described if described is not None else (None, ())
    known: tuple[Tensor, ...] = ()
    scale = gradient_scale(optimizer)
    rows = finer if finer is not None and is_additive(rule) else rows
    if isinstance(rule, WholeTensorRule):
        known = _known(rule, rows, parameter, state, scale)
        rule, state = (rule if known else None), ()
    weight, gradient, *others = (rows(on_observing_device(tensor)) for tensor in (parameter, parameter.grad, *state))
    reads = WeightPass(
        weight, gradient, tuple(others), rule, scale, None if keep is None else keep.view(weight.shape), known
    )
    return ReadPlan(parameter.dtype.to_real(), learning_rate(group), reads)


def _known(
    rule: WholeTensorRule,
    rows: Callable[[Tensor], Tensor],
    parameter: nn.Parameter,
    state: tuple[Tensor, ...],
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the products of a rule that needs whole tensors; empty if it fails or the tensor is sharded."""
    if is_sharded(parameter) or parameter.is_complex() or parameter.grad is None:
        return ()
    gradient = on_observing_device(parameter.grad)
    gradient = gradient if scale is None else gradient / scale
    try:
        weight, others = on_observing_device(parameter.detach()), map(on_observing_device, state)
        return whole_products(rule, rows, weight, gradient.detach(), *others)
    except Exception as error:
        warn_unexplained(rule, error)
        return ()


def by_rule(plans: Sequence[ReadPlan]) -> list[list[int]]:
    """Return the positions of plans that share a rule, a dtype and a device."""
    members: dict[Any, list[int]] = defaultdict(list)
    for k, (dtype, lr, reads) in enumerate(plans):
        rule: UpdateRule | None = reads.rule
        key = id(lr) if rule is None else rule if isinstance(rule, Hashable) else id(rule)
        members[reads.weight.device, dtype, key].append(k)
    return list(members.values())


def explain(plans: Sequence[ReadPlan], products: Sequence[WeightProducts]) -> GroupTerms:
    """Apply the rule that all ``plans`` share to the products that were read."""
    weight_sq, inner, gradient_sq, quartic, *rest = torch.cat([one.sums for one in products], 1)
    rule = plans[0].reads.rule
    terms = None if rule is None else rule.terms(weight_sq, inner, gradient_sq, *rest)
    predicted = predicted_increment(plans[0].lr, gradient_sq)
    return GroupTerms(weight_sq, inner, gradient_sq, quartic, predicted, terms, tuple(rest))
