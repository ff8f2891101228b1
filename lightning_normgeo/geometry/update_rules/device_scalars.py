"""Scalars that an optimizer keeps on a device, copied together.

Fused and capturable optimizers keep the number of steps of each parameter, and often η, as tensors on the device. A
copy of each by itself would take several kernels for each parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normgeo.geometry.rows import on_observing_device


class ScalarCopies(NamedTuple):
    """Copies of one scalar on a device, ``()``."""

    wide: Tensor
    """Its value in float64 (on the CPU if the device has none)."""
    following: Tensor
    """Its value plus one, in its own dtype."""
    wide_following: Tensor
    """Its value plus one, in float64."""


_copies: dict[int, ScalarCopies] = {}
"""Copies by the id of the scalar, inside :func:`copied_together`."""


@contextmanager
def copied_together(optimizer: Optimizer) -> Iterator[None]:
    """Context in which :func:`copies_of` finds copies of all scalars that an optimizer keeps on a device.

    Cost: four kernels for up to a hundred scalars of one dtype; nothing for an optimizer that keeps none.
    """
    global _copies
    outer, kept = _copies, {id(scalar): scalar for scalar in _scalars(optimizer)}
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for key, scalar in kept.items():
        by_kind[scalar.device, scalar.dtype].append(key)
    made: dict[int, ScalarCopies] = {}
    for keys in by_kind.values():
        own = on_observing_device(torch.stack([kept[key].detach() for key in keys]))
        wide = own.to(torch.float64)
        columns = zip(wide.unbind(), (own + 1).unbind(), (wide + 1).unbind(), strict=True)
        made |= {key: ScalarCopies(*parts) for key, parts in zip(keys, columns, strict=True)}
    _copies = made
    try:
        yield
    finally:
        _copies = outer


def copies_of(scalar: Tensor) -> ScalarCopies:
    """Return copies of a scalar on a device: those that were made together, or new ones."""
    found = _copies.get(id(scalar))
    if found is None:
        own = on_observing_device(scalar.detach())
        wide = own.to(torch.float64, copy=True)
        found = ScalarCopies(wide, own + 1, wide + 1)
    return found


def _scalars(optimizer: Optimizer) -> Iterable[Tensor]:
    """Yield the scalars that an optimizer keeps on an accelerator, in its groups and its state."""
    for values in (*optimizer.param_groups, *optimizer.state.values()):
        for value in values.values():
            if isinstance(value, Tensor) and value.ndim == 0 and not value.is_cpu and value.is_floating_point():
                yield value
