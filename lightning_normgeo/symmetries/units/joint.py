"""Units of several layers together: the families of generators that scale all of their slices alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from lightning_normgeo.symmetries.families import Family, Member
from lightning_normgeo.symmetries.solution import Solution
from lightning_normgeo.symmetries.units.cuts import units
from lightning_normgeo.symmetries.units.weight_units import WeightUnits


def joint_units(found: Solution, single: Sequence[WeightUnits]) -> tuple[WeightUnits, ...]:
    """Return the units that consist of slices of several layers, such as all that write into a residual stream.

    They take the place of the single units of their weights, which are controls. A family gives units if it scales
    every parameter as a whole, slice by slice in the same order; other families are left to :class:`.SymmetryMonitor`.

    Args:
        found: all generators of the graph.
        single: units of the single weights, in their order.
    """
    free = {own.name for own in single if not own.invariant}
    taken: set[str] = set()
    result = []
    for family in found.families:
        if family.role == "invariant jointly":
            joint = _units_of(found.exponents, family, free)
            if joint is not None and taken.isdisjoint((joint.name, *joint.others)):
                taken.update((joint.name, *joint.others))
                result.append(joint)
    return tuple(result)


def _units_of(exponents: csr_array, family: Family, free: Collection[str]) -> WeightUnits | None:
    names = [member.slices.parameter for member in family.members]
    # a layer names the units, rather than a class token or a table of positions
    weights = sorted((name for name in names if name in free), key=lambda name: not name.endswith("weight"))
    if len(set(names)) < len(names) or not weights or any(member.exponent != 1 for member in family.members):
        return None
    orders, parts = [], {}
    for member in family.members:
        order = _order(exponents[family.generators], member)
        if order is None:
            return None
        orders.append(order)
        dim = member.slices.axes[0] if len(order) > 1 else 0
        parts[member.slices.parameter] = WeightUnits(
            name=member.slices.parameter, kind="joint", count=len(order), dim=dim, normalization=family.cause
        )
    if any(not np.array_equal(order, orders[0]) for order in orders):
        return None
    first = parts.pop(weights[0])
    return replace(first, partners=tuple(parts.values()))


def _order(exponents: csr_array, member: Member) -> npt.NDArray[np.int64] | None:
    """Return the generator of each run of slices of a member; None if some have none or several."""
    own = member.slices
    values = exponents[:, own.start : own.stop]
    if exponents.shape[0] > 1 and sum(size > 1 for size in own.sizes) != 1:
        return None
    divided = units(values)
    return None if divided is None or len(divided[0]) != exponents.shape[0] else divided[0]
