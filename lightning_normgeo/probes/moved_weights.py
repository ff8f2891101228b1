"""Selection of the weights that one optimizer step moves and that can be measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_normgeo.errors import warn_once
from lightning_normgeo.probes.explain import parameters_of
from lightning_normgeo.probes.weight_step import Observed

_SPARSE = "its gradient is sparse"
_ELSEWHERE = "it is on another device than most weights of the model"


def moving_weights(
    weights: Sequence[Observed],
    unseen: Callable[[Sequence[nn.Parameter]], list[Observed]],
    optimizer: Optimizer,
    skipped: Counter[str],
    device: torch.device,
) -> list[Observed]:
    """Return the weights that an optimizer moves and whose gradients can be read, with their units.

    Args:
        weights: the weights found in autograd graphs.
        unseen: called with the parameters that have gradients and are not among ``weights``; returns those to measure.
        optimizer: the optimizer that is about to take a step.
        skipped: number of weights that were left out, by reason; updated in place.
        device: the device of what is measured; weights on others are left out.
    """
    known = {id(parameter) for observed in weights for parameter in (observed.weight, *observed.partners)}
    moving = [parameter for parameter in parameters_of(optimizer) if parameter.grad is not None]
    held = {id(parameter) for parameter in moving}
    found = []
    strangers = unseen([parameter for parameter in moving if id(parameter) not in known])
    for one in [part for whole in [*weights, *strangers] for part in _moving_parts(whole, held, optimizer)]:
        if left_out_as_sparse(one.units.name, *one.parameters):
            skipped[_SPARSE] += 1
        elif any(parameter.device != device for parameter in one.parameters):
            skipped[_ELSEWHERE] += 1
            warn_once(f"{one.units.name} and others are left out: {_ELSEWHERE}, {device}.", about=_ELSEWHERE)
        else:
            found.append(one)
    return found


def left_out_as_sparse(name: str, *parameters: nn.Parameter) -> bool:
    """Whether a parameter cannot be measured, since its gradient is sparse; this is said once."""
    sparse = any(parameter.grad.is_sparse for parameter in parameters if parameter.grad is not None)
    if sparse:
        warn_once(f"{name} is left out: {_SPARSE}. Give its layer sparse=False to have it measured.")
    return sparse


def _moving_parts(one: Observed, held: Collection[int], optimizer: Optimizer) -> list[Observed]:
    """Return a weight if an optimizer moves it; controls if it moves only some of the parameters of its units."""
    moved = [parameter for parameter in one.parameters if id(parameter) in held]
    if len(moved) == len(one.parameters):
        return [one]
    if one.partners and moved:
        warn_once(
            f"{one.units.name}: a control, since it is scale invariant only together with {len(one.partners)} other "
            f"parameters, some of which {type(optimizer).__name__} does not move. Give all of them to one optimizer to "
            "have their joint norm and angle.",
            about="joint units apart",
        )
        return [part for part in one.apart("invariant only together with others") if id(part.weight) in held]
    if id(one.weight) not in held:
        return []
    warn_once(
        f"{one.units.name}: a control, since it is scale invariant only with its bias, which "
        f"{type(optimizer).__name__} does not move. Give both to one optimizer, or the layer no bias.",
        about="weight and bias apart",
    )
    return [one.as_control("its bias is moved by another optimizer, or by none")]
