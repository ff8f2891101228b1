"""The weights that one step of an optimizer moves, as far as they can be measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.update_rules.recipe import Group
from lightning_normgeo.probes.weight_step import Observed

_SPARSE = "its gradient is sparse"


def moving_weights(
    weights: Sequence[Observed],
    unseen: Callable[[Sequence[nn.Parameter]], list[Observed]],
    optimizer: Optimizer,
    groups: Mapping[int, Group],
    skipped: Counter[str],
) -> list[Observed]:
    """Return the weights that this optimizer moves and whose gradients can be read, with their units.

    Args:
        weights: that graphs have shown.
        unseen: returns what is to be measured of parameters that have gradients and were not shown.
        optimizer: about to move weights.
        groups: its parameter groups, by the ids of their parameters.
        skipped: counts what is left out, by reason.
    """
    known = {id(observed.weight) for observed in weights}
    moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    found = []
    for one in [*weights, *unseen([parameter for parameter in moving if id(parameter) not in known])]:
        if id(one.weight) not in groups or one.weight.grad is None:
            continue
        if one.bias is not None and (id(one.bias) not in groups or one.bias.grad is None):
            one = _apart(one, optimizer)
        if any(p.grad.is_sparse for p in one.parameters if p.grad is not None):
            skipped[_SPARSE] += 1
            warn_once(f"{one.units.name} is left out: {_SPARSE}. Give its layer sparse=False to have it measured.")
        else:
            found.append(one)
    return found


def _apart(one: Observed, optimizer: Optimizer) -> Observed:
    """Return a weight that only with its bias is invariant as a control: this optimizer does not move both."""
    warn_once(
        f"{one.units.name}: a control, since it is scale invariant only with its bias, which "
        f"{type(optimizer).__name__} does not move. Give both to one optimizer, or the layer no bias.",
        about="weight and bias apart",
    )
    return one.as_control("its bias is moved by another optimizer, or by none")
