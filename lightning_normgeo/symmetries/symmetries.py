"""The scale symmetries of a network as a result: families, generators, and what each parameter takes part in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.symmetries.families import ROLES, Family, Role, in_layers, reasons_in_layers
from lightning_normgeo.symmetries.roles import NONE, ByRole, parameter_groups
from lightning_normgeo.symmetries.slices import Slices
from lightning_normgeo.utilities.notebook import NotebookTable, summary


@dataclass(frozen=True)
class Symmetries:
    r"""A basis of the scale symmetries of a network.

    A symmetry multiplies slices of the parameters by :math:`e^{s_i t}`, with an exponent s_i for each slice i, and
    leaves the loss as it is, for every t. Its *charge* :math:`\sum_i s_i \langle W_i, \nabla_{W_i} L\rangle` is
    therefore zero (section 2.5 of Sun et al. 2020, for one slice Lemma 2).

    Attributes:
        families: the generators of the basis, grouped.
        slices: slices of the parameters, the columns of ``exponents``.
        exponents: exponents s of each generator, of shape (generators, slices).
        unknown: number of operations that are not understood by name. They may hide symmetries.
        reasons: for each parameter that is in no symmetry, the first operation that forbids one, in words.
        batch_norms: for each batch normalization with running statistics, exponents of the channels of its input, of
            shape (generators, channels); None in place of a matrix that is not known. None if it was not looked at.
    """

    families: tuple[Family, ...]
    slices: tuple[Slices, ...]
    exponents: csr_array
    unknown: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    batch_norms: Mapping[str, csr_array | None] | None = None

    def __len__(self) -> int:
        return int(self.exponents.shape[0])

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name."""
        return {own.parameter: own.shape for own in self.slices}

    @cached_property
    def generator_of_entry(self) -> npt.NDArray[np.int64]:
        """The generator of each stored exponent of ``exponents``."""
        return np.repeat(np.arange(len(self)), np.diff(self.exponents.indptr))

    @cached_property
    def scales_one_number(self) -> npt.NDArray[np.bool_]:
        """For each generator, whether it scales a single number, which has no direction.

        Such a number is a gain in front of a normalization. Its gradient is zero up to ε and rounding.
        """
        lengths = [np.full(own.count, prod(own.shape) // max(own.count, 1)) for own in self.slices]
        elements = abs(self.exponents).sign() @ np.concatenate([*lengths, np.zeros(0)])
        result: npt.NDArray[np.bool_] = elements == 1
        return result

    def role_masks(self, parameter: str) -> dict[str, npt.NDArray[np.bool_]]:
        """Return for each role a mask of the elements of a parameter that have it; each element has one role.

        Roles in the order of precedence: without effect, invariant alone, invariant jointly, rescaling, none.
        """
        free = np.ones(self.parameters[parameter], bool)
        masks: dict[str, npt.NDArray[np.bool_]] = {}
        for role in ROLES:
            touched = np.zeros_like(free)
            for own in self.slices:
                if own.parameter == parameter:
                    touched |= own.spread(self._in_role[role][own.start : own.stop])
            masks[role] = touched & free
            free &= ~touched
        masks[NONE] = free
        return masks

    @cached_property
    def _in_role(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Slices in generators of each role."""
        found: dict[str, npt.NDArray[np.bool_]] = {role: np.zeros(self.exponents.shape[1], bool) for role in ROLES}
        for family in self.families:
            found[family.role][self.exponents[family.generators].indices] = True
        return found

    @cached_property
    def shares(self) -> dict[str, float]:
        """The fraction of all elements of parameters by their role."""
        counts = dict.fromkeys((*ROLES, NONE), 0)
        for parameter in self.parameters:
            for role, mask in self.role_masks(parameter).items():
                counts[role] += int(mask.sum())
        whole = sum(counts.values()) or 1
        return {role: count / whole for role, count in counts.items()}

    def sums(self, products: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        """Return Σ_i s_i·x_i of each generator, where x_i is the sum of a tensor over slice i.

        Args:
            products: for each parameter a tensor of its shape, such as W·∇W; parameters without one count as zero. Of
                complex ones the real part counts, which of W times the conjugate of ∇W is ⟨W, ∇W⟩.
        """
        result: npt.NDArray[np.float64] = self.exponents @ self.slice_sums(products)
        return result

    def slice_sums(self, products: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        """Return the sum of a tensor over each slice, as in :meth:`sums`."""
        over = [self._over(own, products.get(own.parameter)) for own in self.slices]
        return np.concatenate(over) if over else np.zeros(0)

    @cached_property
    def matrix(self) -> Tensor:
        """The exponents as a sparse tensor in float64, as the functions of ``lightning_normgeo.geometry`` take them."""
        return sparse_tensor(self.exponents)

    def in_role(self, role: Role) -> npt.NDArray[np.int64]:
        """Return the numbers of the generators that have a role."""
        found = [family.generators for family in self.families if family.role == role]
        return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def parameter_groups(
        self,
        module: nn.Module,
        weight_decay: ByRole | None = None,
        lr: ByRole | None = None,
        corrected_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups by role, for an optimizer.

        See :func:`lightning_normgeo.symmetries.roles.parameter_groups`.
        """
        return parameter_groups(self, module, weight_decay, lr, corrected_decay)

    def _over(self, own: Slices, tensor: Tensor | None) -> npt.NDArray[np.float64]:
        if tensor is None:
            return np.zeros(own.count)
        inside = [axis for axis, size in enumerate(own.sizes) if size == 1 and own.shape[axis] > 1]
        tensor = on_observing_device(tensor.detach())
        summed = (tensor.real if tensor.is_complex() else tensor).double()
        return (summed.sum(inside) if inside else summed).reshape(-1).cpu().numpy()

    def charges(self, parameters: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        """Return the charge Σ_i s_i ⟨W_i, ∇W_i⟩ of each generator, from ``.grad`` of the parameters.

        Args:
            parameters: parameters by name, as in ``dict(module.named_parameters())``.
        """
        grads = {name: p.detach() * p.grad.conj() for name, p in parameters.items() if p.grad is not None}
        return self.sums(grads)

    def __repr__(self) -> str:
        roles = {role: sum(f.count for f in self.families if f.role == role) for role in ROLES}
        parts = [f"{count} {role}" for role, count in roles.items() if count]
        return summary("Symmetries", [f"{len(self)} generators", *parts])

    def __str__(self) -> str:
        """Return a text with the share of each role, the families, and what is in none."""
        shares = ", ".join(f"{_percent(share)} {role}" for role, share in self.shares.items() if share)
        lines = [f"{len(self)} scale symmetries in {len(self.families)} families; parameters: {shares}"]
        role = None
        for alike, text in in_layers(self.families):
            first, layers = alike[0], len(alike)
            if first.role != role:
                role = first.role
                lines.append(f"{role}:")
            times = f"{layers} × {first.count}" if layers > 1 else f"{first.count}"
            lines.append(f"  {times}× {text}" + (f"  ({first.cause})" if first.cause else ""))
        if self.reasons:
            found = reasons_in_layers(self.reasons)
            lines += ["none:", *(f"  {f'{n} × ' if n > 1 else ''}{name}  ({reason})" for n, name, reason in found)]
        if self.unknown:
            names = ", ".join(f"{name} ×{count}" for name, count in self.unknown.items())
            lines.append(f"not understood, and may hide symmetries: {names}")
        return "\n".join(lines)

    def _table(self) -> NotebookTable:
        rows: list[tuple[str, str, int, str]] = [
            (text, alike[0].role, len(alike) * alike[0].count, alike[0].cause)
            for alike, text in in_layers(self.families)
        ]
        rows += [(name, NONE, 0, reason) for _, name, reason in reasons_in_layers(self.reasons)]
        notes = [f"not understood, and may hide symmetries: {name}" for name in self.unknown]
        return NotebookTable("Scale symmetries", ("slices", "role", "count", "why"), rows, notes)

    def _repr_html_(self) -> str:
        return self._table().to_html()

    def to_frame(self) -> Any:
        """Return a pandas data frame with a row for each family, and one for each parameter that is in none.

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        return self._table().to_frame("slices")


def sparse_tensor(matrix: csr_array) -> Tensor:
    """Return a sparse matrix as a sparse tensor in float64."""
    found = matrix.tocoo()
    indices = torch.from_numpy(np.stack([found.row, found.col]).astype(np.int64))
    values = torch.from_numpy(found.data.astype(np.float64))
    return torch.sparse_coo_tensor(indices, values, found.shape, check_invariants=False).coalesce()


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "< 0.1%"
