"""Parameters before and after a step, read slice by slice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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


@dataclass(frozen=True)
class ParametersBefore:
    """State of the parameters before a step.

    Attributes:
        sums: over all slices.
        lr: η of each slice.
        weight_decay: λ of each slice.
        moved: whether the optimizer moves the slice and it has a gradient.
        copies: copies of the parameters of joint families, by name.
    """

    sums: SliceSums
    lr: Tensor
    weight_decay: Tensor
    moved: np.ndarray[Any, Any]
    copies: dict[str, Tensor]

    @classmethod
    def read(
        cls, symmetries: Symmetries, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
    ) -> ParametersBefore:
        """Read the parameters that an optimizer moves."""
        groups = groups_of(optimizer)
        moved = {n: p for n, p in parameters.items() if id(p) in groups and p.grad is not None}
        device = next(iter(moved.values())).device if moved else torch.device("cpu")
        gradients = {name: parameter.grad for name, parameter in moved.items() if parameter.grad is not None}
        sums = slice_sums(symmetries.slices, moved, gradients, device)
        scale = gradient_scale(optimizer)
        if scale is not None:  # fused optimizers unscale the gradients inside their step
            sums = sums._replace(inner=sums.inner / scale, gradient_sq=sums.gradient_sq / scale.square())
        owners = [own.parameter for own in symmetries.slices for _ in range(own.count)]
        options = {name: groups[id(parameter)] for name, parameter in moved.items()}
        rates = {name: _number(group.get("lr", math.nan)) for name, group in options.items()}
        decays = {name: _number(group.get("weight_decay", 0.0)) for name, group in options.items()}
        lr, decay = ([table.get(name, 0.0) for name in owners] for table in (rates, decays))
        kept = {
            member.slices.parameter
            for family in symmetries.families
            if _is_one_vector(family)
            for member in family.members
        }
        wide = wide_dtype(device)
        return cls(
            sums,
            torch.tensor(lr, dtype=wide, device=device),
            torch.tensor(decay, dtype=wide, device=device),
            np.array([name in moved for name in owners], bool),
            {name: moved[name].detach().clone() for name in kept if name in moved},
        )

    def compared(
        self, symmetries: Symmetries, parameters: Mapping[str, nn.Parameter], refuted: set[str]
    ) -> SymmetryStep | None:
        """Return the sums over generators, with the weights as they are after the step."""
        whole = np.bincount(symmetries.generator_of_entry, ~self.moved[symmetries.exponents.indices]) == 0
        families, order, start = [], [], 0
        for family in symmetries.families:
            own = family.generators[whole[family.generators]]
            if family.role != "without effect" and str(family) not in refuted and len(own):
                families.append((family, slice(start, start + len(own))))
                order.append(own)
                start += len(own)
        if not families:
            return None
        device = self.sums.inner.device
        sums = _Generators(symmetries, np.concatenate(order), device)
        after = squared_norms(symmetries.slices, parameters, device)
        weight_sq, inner, gradient_sq = self.sums
        bound = (sums(weight_sq, 2) * sums(gradient_sq, 0)).sqrt()
        joint = {k: family for k, (family, _) in enumerate(families) if _is_one_vector(family)}
        return SymmetryStep(
            families,
            sums(inner) / bound,
            sums.absolute(inner.abs()) / bound,
            sums(weight_sq),
            sums.absolute(weight_sq),
            sums(after - weight_sq),
            sums(self.lr.square() * gradient_sq),
            sums(-2 * self.lr * self.weight_decay * weight_sq),
            {k: self._turned(family, parameters) for k, family in joint.items()},
            {k: self._effective_lr(family, weight_sq) for k, family in joint.items()},
        )

    def _turned(self, family: Family, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the angle by which all slices of a joint family turn, as one vector."""
        names = dict.fromkeys(member.slices.parameter for member in family.members)
        pairs = [(self.copies[name], parameters[name].detach()) for name in names]
        return _angle(pairs)

    def _effective_lr(self, family: Family, weight_sq: Tensor) -> Any:
        rates = torch.cat([self.lr[member.slices.start : member.slices.stop] for member in family.members])
        sizes = sum(weight_sq[member.slices.start : member.slices.stop].sum() for member in family.members)
        return torch.where(rates.min() == rates.max(), rates[0] / sizes, math.nan)


def _is_one_vector(family: Family) -> bool:
    """Whether a family consists of whole parameters that are invariant as one vector."""
    whole = all(member.count == member.slices.count and member.exponent == 1 for member in family.members)
    return family.role == "invariant jointly" and family.count == 1 and whole


def _angle(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the angle between several tensors before and after a step, as one vector."""
    rows = [(before.reshape(1, -1), after.reshape(1, -1)) for before, after in pairs]
    return split_update(joined_products(*many_update_products(rows))).angle[0]


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


class _Generators:
    """Sums over the slices of each generator, on a device."""

    def __init__(self, symmetries: Symmetries, order: np.ndarray[Any, Any], device: torch.device) -> None:
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
