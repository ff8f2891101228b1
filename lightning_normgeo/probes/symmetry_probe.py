"""Probe of scale symmetries: what each generator of a network's symmetries shows in one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.angles import joined_products, many_update_products, split_update
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.probes.explain import gradient_scale, groups_of
from lightning_normgeo.probes.slice_sums import SliceSums, slice_sums, squared_norms
from lightning_normgeo.symmetries.families import Family
from lightning_normgeo.symmetries.search import symmetries_in
from lightning_normgeo.symmetries.symmetries import Symmetries

_GRAPHS = 16
_REFUTED_ABOVE = 1e-2
"""Root mean square charge of a family above which it can be refuted: rounding leaves 1e-6 in float32, and up to 1e-2
under bf16 autocast."""
_REFUTED_SHARE = 0.1
"""Share of the terms that has to remain for a family to be refuted."""


@dataclass(frozen=True)
class SymmetryStep:
    """Sums over generators in one optimizer step; generators without all of their gradients are left out.

    Attributes:
        families: families with at least one generator, and the places of their generators in the tensors.
        charge: Σ s_i ⟨W_i, g_i⟩ over its bound √(Σ s_i²‖W_i‖² · Σ‖g_i‖²), in [-1, 1].
        uncanceled: Σ |s_i ⟨W_i, g_i⟩| over the same bound, in [0, 1]: the charge if its terms did not cancel.
        quantity: Q = Σ s_i ‖W_i‖² before the step.
        size: Σ |s_i| ‖W_i‖² before the step.
        increment: Q⁺ − Q, measured.
        noise: Σ s_i η² ‖g_i‖², the increment under plain SGD.
        decay: −2 Σ s_i η λ ‖W_i‖², the part of weight decay.
        angle: for each family that is invariant jointly, the angle by which its weights turn, as one vector.
        lr: for each such family η / Σ ‖W_i‖², the effective learning rate; NaN if its parameters have several η.
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


class SymmetryProbe:
    """Finds the symmetries in the graphs of measured steps, and reads the parameters before and after each step.

    Attributes:
        symmetries: those of the graphs since :meth:`forget`; None without any, or if graphs differ.
        differ: whether graphs of one step have different symmetries.
        refuted: texts of families that measurements have refuted.
    """

    def __init__(self) -> None:
        self.symmetries: Symmetries | None = None
        self.differ = False
        self.refuted: set[str] = set()
        self._known: dict[tuple[Any, ...], tuple[Symmetries, dict[str, nn.Parameter]]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._before: _Before | None = None
        self._steps: list[SymmetryStep] = []

    @property
    def knows_graphs(self) -> bool:
        """Whether some graph has been searched, with what is known about its constants."""
        return bool(self._known)

    def forget(self) -> None:
        """Forget the graphs of the last step."""
        self.symmetries, self.differ = None, False
        self._before, self._steps = None, []

    def read(self, module: nn.Module, graph: Graph) -> None:
        """Add the symmetries of a graph, before its backward pass."""
        if graph.signature not in self._known:
            parameters = by_clean_name(module.named_parameters())
            found = symmetries_in(graph, module), parameters
            if len(self._known) < _GRAPHS:
                self._known[graph.signature] = found
        else:
            found = self._known[graph.signature]
        if self.symmetries is not None and self.symmetries is not found[0]:
            self.differ = True
        self.symmetries, self._parameters = found

    def refute(self, charges: Mapping[str, float], uncanceled: Mapping[str, float]) -> set[str]:
        """Return the families that their charges refute, with one warning; they are left out from now on.

        Families on single layers are left to the check of units, which knows the ε of batch normalizations.

        Args:
            charges: root mean square charge of each family.
            uncanceled: the same of charges whose terms do not cancel.
        """
        families = {} if self.symmetries is None else {str(f): f for f in self.symmetries.families}
        found = {
            name
            for name, charge in charges.items()
            if charge > max(_REFUTED_ABOVE, _REFUTED_SHARE * uncanceled.get(name, 1.0))
            and name in families
            and families[name].role != "invariant alone"
        }
        if found:
            self.refuted |= found
            largest = max(charges[name] for name in found)
            warn_once(
                f"{len(found)} families of scale symmetries are left out from here on: the graph shows them, and the "
                f"numbers refute them, with charges up to {largest:.2g}: {min(found)}. Likely reasons: something that "
                "changes gradients (a hook, clipping by value), or the ε of a normalization."
            )
        return found

    def drop(self) -> None:
        """Forget a step that no single gradient describes."""
        self._before = None

    def before(self, optimizer: Optimizer) -> None:
        """Read weights and gradients: gradients are final, the update has not begun."""
        if self.symmetries is not None and not self.differ and len(self.symmetries):
            self._before = _Before.read(self.symmetries, self._parameters, optimizer)

    def after(self) -> None:
        """Read the weights after the update."""
        if self._before is not None and self.symmetries is not None:
            step = self._before.compared(self.symmetries, self._parameters, self.refuted)
            self._steps += [] if step is None else [step]
        self._before = None

    def collect(self) -> SymmetryStep | None:
        """Return what was read since :meth:`forget`, of all optimizers that took a step; None for nothing."""
        steps, self._steps = self._steps, []
        return _joined(steps) if steps else None


def _joined(steps: Sequence[SymmetryStep]) -> SymmetryStep:
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


@dataclass(frozen=True)
class _Before:
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
    def read(cls, symmetries: Symmetries, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> _Before:
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
