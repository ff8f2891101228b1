"""Parameters before and after a step, read slice by slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.geometry.angles import joined_products, many_update_products, split_update
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.probes.explain import gradient_scale, groups_of
from lightning_normgeo.probes.symmetries.slice_sums import SliceSums, slice_sums, squared_norms
from lightning_normgeo.probes.symmetries.step import SymmetryStep
from lightning_normgeo.symmetries.families import Family
from lightning_normgeo.symmetries.symmetries import Symmetries

Flags = npt.NDArray[Any]


@dataclass(frozen=True)
class ParametersBefore:
    """State of the parameters before a step.

    Attributes:
        symmetries: of the graphs that the gradients come from.
        parameters: parameters by name.
        sums: over all slices.
        lr: η of each slice.
        weight_decay: λ of each slice.
        moved: whether the optimizer moves the slice and it has a gradient.
        copies: copies of the parameters that are invariant as one vector, by name.
    """

    symmetries: Symmetries
    parameters: Mapping[str, nn.Parameter]
    sums: SliceSums
    lr: Tensor
    weight_decay: Tensor
    moved: Flags
    copies: dict[str, Tensor]

    @classmethod
    def read(
        cls,
        symmetries: Symmetries,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        without: Collection[str] = (),
    ) -> ParametersBefore:
        """Read the parameters that an optimizer moves, except those called ``without``."""
        groups = groups_of(optimizer)
        moved = {
            name: parameter
            for name, parameter in parameters.items()
            if id(parameter) in groups and parameter.grad is not None and name not in without
        }
        device = next(iter(moved.values())).device if moved else torch.device("cpu")
        gradients = {name: parameter.grad for name, parameter in moved.items() if parameter.grad is not None}
        sums = slice_sums(symmetries.slices, moved, gradients, device)
        scale = gradient_scale(optimizer)
        if scale is not None:  # fused optimizers unscale the gradients inside their step
            sums = sums._replace(inner=sums.inner / scale, gradient_sq=sums.gradient_sq / scale.square())

        def of_each(value: Callable[[str], float]) -> Flags:
            counts = [own.count for own in symmetries.slices]
            return np.repeat([value(own.parameter) for own in symmetries.slices], counts)

        def option(name: str, missing: float) -> Tensor:
            values = {n: _number(groups[id(p)].get(name, missing)) for n, p in moved.items()}
            found = of_each(lambda own: values.get(own, 0.0))
            return torch.from_numpy(found).to(device, wide_dtype(device))

        joint = [member for family in symmetries.families if _is_one_vector(family) for member in family.members]
        names = {member.slices.parameter for member in joint} & moved.keys()
        copies = {name: moved[name].detach().clone() for name in names}
        lr, decay = option("lr", math.nan), option("weight_decay", 0.0)
        return cls(symmetries, parameters, sums, lr, decay, of_each(lambda own: own in moved), copies)

    def compared(self, refuted: Collection[str]) -> SymmetryStep | None:
        """Return the sums over generators, with the weights as they are after the step; None without generators.

        Args:
            refuted: texts of families to leave out.
        """
        symmetries = self.symmetries
        missing = ~self.moved[symmetries.exponents.indices]
        whole = np.bincount(symmetries.generator_of_entry, missing, len(symmetries)) == 0
        families, order, start = [], [], 0
        for family in symmetries.families:
            own = family.generators[whole[family.generators]]
            if family.role != "without effect" and str(family) not in refuted and len(own):
                families.append((family, slice(start, start + len(own))))
                order.append(own)
                start += len(own)
        return self._step(families, np.concatenate(order)) if families else None

    def _step(self, families: Sequence[tuple[Family, slice]], order: npt.NDArray[np.int64]) -> SymmetryStep:
        weight_sq, inner, gradient_sq = self.sums
        sums = _Generators(self.symmetries, order, inner.device)
        after = squared_norms(self.symmetries.slices, self.parameters, inner.device)
        bound = (sums(weight_sq, 2) * sums(gradient_sq, 0)).sqrt()
        joint = {k: family for k, (family, _) in enumerate(families) if _is_one_vector(family)}
        return SymmetryStep(
            families,
            charge=sums(inner) / bound,
            uncanceled=sums.absolute(inner.abs()) / bound,
            quantity=sums(weight_sq),
            size=sums.absolute(weight_sq),
            increment=sums(after - weight_sq),
            noise=sums(self.lr.square() * gradient_sq),
            decay=sums(-2 * self.lr * self.weight_decay * weight_sq),
            angle={k: self._turned(family) for k, family in joint.items()},
            lr={k: self._effective_lr(family) for k, family in joint.items()},
        )

    def _turned(self, family: Family) -> Tensor:
        """Return the angle by which the parameters of a family turn, as one vector."""
        names = dict.fromkeys(member.slices.parameter for member in family.members)
        rows = [(self.copies[name].reshape(1, -1), self.parameters[name].detach().reshape(1, -1)) for name in names]
        return split_update(joined_products(*many_update_products(rows))).angle[0]

    def _effective_lr(self, family: Family) -> Tensor:
        """Return η/‖W‖² of the parameters of a family as one vector; NaN if they have several η."""
        places = [slice(member.slices.start, member.slices.stop) for member in family.members]
        rates = torch.cat([self.lr[place] for place in places])
        size = torch.cat([self.sums.weight_sq[place] for place in places]).sum()
        return torch.where(rates.min() == rates.max(), rates[0] / size, math.nan)


def _is_one_vector(family: Family) -> bool:
    """Whether a family consists of whole parameters that are invariant as one vector."""
    whole = all(member.count == member.slices.count and member.exponent == 1 for member in family.members)
    return family.role == "invariant jointly" and family.count == 1 and whole


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


class _Generators:
    """Sums over the slices of each generator, on a device."""

    def __init__(self, symmetries: Symmetries, order: npt.NDArray[np.int64], device: torch.device) -> None:
        matrix = symmetries.exponents[order].tocsr()
        rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        self._count = matrix.shape[0]
        self._rows, self._columns = (torch.from_numpy(a.astype(np.int64)).to(device) for a in (rows, matrix.indices))
        self._exponents = torch.from_numpy(matrix.data).to(device, wide_dtype(device))

    def __call__(self, values: Tensor, power: int = 1) -> Tensor:
        """Return Σ s_i^power · x_i."""
        return self._added(self._exponents**power * values[self._columns])

    def absolute(self, values: Tensor) -> Tensor:
        """Return Σ |s_i| · x_i."""
        return self._added(self._exponents.abs() * values[self._columns])

    def _added(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._count).index_add(0, self._rows, values)
