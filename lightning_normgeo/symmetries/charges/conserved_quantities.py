"""Terms of the increments of conserved quantities, for the next step of an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.charges import quantity_increment
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms, UpdateRule
from lightning_normgeo.geometry.increments.norm_increments import norm_increment
from lightning_normgeo.geometry.rows import dot, map_rows, on_observing_device
from lightning_normgeo.geometry.update_rules.registry import describe_update
from lightning_normgeo.geometry.update_rules.whole_tensor import WholeTensorRule, whole_products
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.symmetries.slices import Slices
from lightning_normgeo.symmetries.symmetries import Symmetries


def quantity_terms(symmetries: Symmetries, module: nn.Module, *optimizers: Optimizer) -> IncrementTerms:
    r"""Return the terms of the increment of :math:`Q = \sum_i s_i\lVert W_i\rVert^2` in the next optimizer step.

    Call it when the gradients are final and no weight has changed yet. The terms are those of each slice, added up; see
    :func:`lightning_normgeo.geometry.quantity_increment`.

    Args:
        symmetries: of the module, as from :func:`scale_symmetries`.
        module: the module, with gradients.
        optimizers: the optimizers that will step, each with a known update rule. Parameters that none of them has or
            that have no gradient do not move.

    Returns:
        Four terms, each ``(generators,)`` in float64, in units of weight².

    Raises:
        ConfigurationError: for an optimizer without a known rule.

    Cost: one pass over weights, gradients and states for each set of slices, in float64.

    Example:
        >>> import torch
        >>> from lightning_normgeo import scale_symmetries
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
        >>> x = torch.randn(8, 4, dtype=torch.float64)
        >>> symmetries, optimizer = scale_symmetries(network, x), torch.optim.SGD(network.parameters(), lr=0.1)
        >>> network(x).tanh().sum().backward()
        >>> quantity = lambda: symmetries.sums({name: p.square() for name, p in network.named_parameters()})
        >>> before, terms = quantity(), quantity_terms(symmetries, network, optimizer)
        >>> optimizer.step()
        >>> torch.allclose(terms.total, torch.from_numpy(quantity() - before))
        True
    """
    named = by_clean_name(module.named_parameters())
    owners = {
        id(p): (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    parts = []
    for own in symmetries.slices:
        parameter = named[own.parameter]
        if id(parameter) not in owners or parameter.grad is None:
            parts.append(IncrementTerms(*torch.zeros(4, own.count, dtype=torch.float64)))
            continue
        optimizer, group = owners[id(parameter)]
        described = describe_update(optimizer, group, optimizer.state[parameter], parameter.dtype.to_real(), parameter)
        if described is None:
            raise ConfigurationError(
                f"{type(optimizer).__name__} has no known update rule for {own.parameter}. Register one: "
                "lightning_normgeo.register_optimizer."
            )
        tensors = map(on_observing_device, (parameter.detach(), parameter.grad, *described[1]))
        parts.append(_slice_terms(own, described[0], *tensors))
    joined = IncrementTerms(
        *(torch.cat([term.cpu().double() for term in column]) for column in zip(*parts, strict=True))
    )
    return quantity_increment(symmetries.matrix, joined)


def _slice_terms(own: Slices, rule: UpdateRule, weight: Tensor, gradient: Tensor, *state: Tensor) -> IncrementTerms:
    """Return the terms of each slice of a parameter."""
    if not isinstance(rule, WholeTensorRule):
        return norm_increment(rule, *map(own.rows, (weight, gradient, *state)))
    products = whole_products(rule, own.rows, weight, gradient, *state)
    shared = map_rows(lambda w, g: (dot(w, w), dot(w, g), dot(g, g)), own.rows(weight), own.rows(gradient))
    return rule.terms(*shared, *products)
