"""Sums over the generators of all scale symmetries in one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_normgeo.geometry.steps.angles import joined_products, split_update
from lightning_normgeo.probes.symmetries.parameters import SliceStep, is_one_vector
from lightning_normgeo.symmetries.families import Family
from lightning_normgeo.symmetries.symmetries import Symmetries

_CACHED = 8
"""Number of sets of generators to remember, such as those of several optimizers or graphs."""


@dataclass(frozen=True)
class SymmetryStep:
    """Sums over generators in one optimizer step; generators without all of their gradients are left out.

    Attributes:
        families: families with at least one generator, and the places of their generators in the tensors.
        charge: Σ s_i ⟨W_i, g_i⟩ over its bound √(Σ s_i²‖W_i‖² · Σ‖g_i‖²), in [-1, 1]; NaN where the bound is zero,
            and for a single number, whose gradient is zero up to rounding, so that the charge is the bound itself.
        uncanceled: Σ |s_i ⟨W_i, g_i⟩| over the same bound, in [0, 1]: the charge if its terms did not cancel.
        quantity: Q = Σ s_i ‖W_i‖² before the step.
        size: Σ |s_i| ‖W_i‖² before the step.
        increment: Q⁺ − Q, measured.
        noise: Σ s_i η² ‖g_i‖², the increment under plain SGD.
        decay: −2 Σ s_i η λ ‖W_i‖², the part of weight decay.
        angle: for each family that is invariant jointly, the angle by which its weights turn, as one vector.
        lr: for each such family η / Σ ‖W_i‖², the effective learning rate; NaN if its parameters have several η, or are
            zero.
    """

    families: Sequence[tuple[Family, slice]]
    charge: Tensor
    uncanceled: Tensor
    quantity: Tensor
    size: Tensor
    increment: Tensor
    noise: Tensor
    decay: Tensor
    angle: Mapping[int, Tensor]
    lr: Mapping[int, Tensor]

    def without(self, names: set[str]) -> SymmetryStep:
        """Return the same step without some families."""
        kept = {k: pair for k, pair in enumerate(self.families) if str(pair[0]) not in names}
        return replace(
            self,
            families=list(kept.values()),
            angle={n: self.angle[k] for n, k in enumerate(kept) if k in self.angle},
            lr={n: self.lr[k] for n, k in enumerate(kept) if k in self.lr},
        )


def joined(steps: Sequence[SymmetryStep]) -> SymmetryStep:
    """Return the steps of several optimizers as one."""
    if len(steps) == 1:
        return steps[0]
    names = ("charge", "uncanceled", "quantity", "size", "increment", "noise", "decay")
    tensors = {name: torch.cat([getattr(step, name) for step in steps]) for name in names}
    families: list[tuple[Family, slice]] = []
    angle: dict[int, Tensor] = {}
    lr: dict[int, Tensor] = {}
    start = 0
    for step in steps:
        angle |= {len(families) + k: value for k, value in step.angle.items()}
        lr |= {len(families) + k: value for k, value in step.lr.items()}
        families += [(family, slice(start + own.start, start + own.stop)) for family, own in step.families]
        start += len(step.charge)
    return SymmetryStep(families, **tensors, angle=angle, lr=lr)


def by_generator(
    step: SliceStep, refuted: Collection[str], cache: dict[tuple[Any, ...], Generators]
) -> SymmetryStep | None:
    """Return the sums over generators all slices of which were moved; None without any.

    Args:
        step: all slices.
        refuted: texts of families to leave out.
        cache: generators of earlier steps on their devices, to which sending them is a transfer; updated in place.
    """
    symmetries = step.symmetries
    missing = ~step.moved[symmetries.exponents.indices]
    whole = np.bincount(symmetries.generator_of_entry, missing, len(symmetries)) == 0
    families, order, start = [], [], 0
    for family in symmetries.families:
        own = family.generators[whole[family.generators]]
        if family.role != "without effect" and str(family) not in refuted and len(own):
            families.append((family, slice(start, start + len(own))))
            order.append(own)
            start += len(own)
    return _summed(step, families, _generators(step, np.concatenate(order), cache)) if families else None


def _generators(step: SliceStep, order: npt.NDArray[np.int64], cache: dict[tuple[Any, ...], Generators]) -> Generators:
    device = step.after.device
    key = id(step.symmetries), order.tobytes(), device
    if key not in cache:
        if len(cache) >= _CACHED:
            cache.clear()
        cache[key] = Generators(step.symmetries, order, device)
    return cache[key]


def _summed(step: SliceStep, families: Sequence[tuple[Family, slice]], sums: Generators) -> SymmetryStep:
    weight_sq, inner, gradient_sq = step.sums
    bound = (sums(weight_sq, 2) * sums(gradient_sq, 0)).sqrt()
    bound = bound.masked_fill(sums.of_one_number, math.nan)
    joint = {k: family for k, (family, _) in enumerate(families) if is_one_vector(family)}
    return SymmetryStep(
        families,
        charge=sums(inner) / bound,
        uncanceled=sums.absolute(inner.abs()) / bound,
        quantity=sums(weight_sq),
        size=sums.absolute(weight_sq),
        increment=sums(step.after - weight_sq),
        noise=sums(step.lr.square() * gradient_sq),
        decay=sums(-2 * step.lr * step.weight_decay * weight_sq),
        angle={k: _turned(step, family) for k, family in joint.items()},
        lr={k: _effective_lr(step, family) for k, family in joint.items()},
    )


def _turned(step: SliceStep, family: Family) -> Tensor:
    """Return the angle by which the parameters of a family turn, as one vector."""
    names = dict.fromkeys(member.slices.parameter for member in family.members)
    return split_update(joined_products(*(step.products[name] for name in names))).angle[0]


def _effective_lr(step: SliceStep, family: Family) -> Tensor:
    """Return η/‖W‖² of the parameters of a family as one vector; NaN if they have several η, or are zero."""
    places = [slice(member.slices.start, member.slices.stop) for member in family.members]
    rates = torch.cat([step.lr[place] for place in places])
    size = torch.cat([step.sums.weight_sq[place] for place in places]).sum()
    return torch.where((rates.min() == rates.max()) & (size > 0), rates[0] / size, math.nan)


class Generators:
    """Sums over the slices of each generator, on a device.

    Attributes:
        of_one_number: for each generator, whether it scales a single number.
    """

    def __init__(self, symmetries: Symmetries, order: npt.NDArray[np.int64], device: torch.device) -> None:
        self._symmetries = symmetries  # kept alive: the cache knows them by id
        matrix = symmetries.exponents[order].tocsr()
        rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        self._count = matrix.shape[0]
        self._rows, self._columns = (torch.from_numpy(a.astype(np.int64)).to(device) for a in (rows, matrix.indices))
        self._exponents = torch.from_numpy(matrix.data).to(device, torch.float64)
        self.of_one_number = torch.from_numpy(symmetries.scales_one_number[order]).to(device)

    def __call__(self, values: Tensor, power: int = 1) -> Tensor:
        """Return Σ s_i^power · x_i."""
        return self._added(self._exponents**power * values[self._columns])

    def absolute(self, values: Tensor) -> Tensor:
        """Return Σ |s_i| · x_i."""
        return self._added(self._exponents.abs() * values[self._columns])

    def _added(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._count).index_add(0, self._rows, values)
