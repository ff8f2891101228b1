"""Slices of the parameters that one optimizer moves, read before and after its step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.geometry.columns import repeated
from lightning_normgeo.geometry.rows import main_device, observing_device, on_observing_device
from lightning_normgeo.geometry.steps.angles import UpdateProducts, many_update_products
from lightning_normgeo.geometry.update_rules.recipe import scalar
from lightning_normgeo.probes.explain import gradient_scale, groups_of
from lightning_normgeo.probes.moved_weights import left_out_as_sparse
from lightning_normgeo.symmetries.charges.slice_sums import SliceSums, slice_sums, squared_norms
from lightning_normgeo.symmetries.families import Family
from lightning_normgeo.symmetries.symmetries import Symmetries

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SliceStep:
    """Slices of all parameters in one step; zero for those that no optimizer moves.

    Attributes:
        symmetries: of the graph that the gradients come from.
        sums: over each slice before the step.
        after: ‖W_i‖² of each slice after the step.
        lr: η of each slice.
        weight_decay: λ of each slice.
        moved: whether an optimizer moves the slice and it has a gradient.
        products: of the updates of parameters that are invariant as one vector, by name.
    """

    symmetries: Symmetries
    sums: SliceSums
    after: Tensor
    lr: Tensor
    weight_decay: Tensor
    moved: Array
    products: Mapping[str, UpdateProducts]

    def with_another(self, other: SliceStep) -> SliceStep:
        """Return the step with the slices that another optimizer has moved, or the other step if it moved the same."""
        if (self.moved & other.moved).any():
            return other
        return replace(
            self,
            sums=SliceSums(*(a + b for a, b in zip(self.sums, other.sums, strict=True))),
            after=self.after + other.after,
            lr=self.lr + other.lr,
            weight_decay=self.weight_decay + other.weight_decay,
            moved=self.moved | other.moved,
            products={**self.products, **other.products},
        )


class ParametersBefore:
    """Parameters that an optimizer moves, before its step: gradients are final, the update has not begun.

    Args:
        symmetries: of the graph that the gradients come from.
        parameters: all parameters of the model by name.
        optimizer: about to take its step.
        without: names of parameters to leave out.
        buffers: memory for copies of parameters, by id, which is kept: fresh pages cost more than a copy.
    """

    def __init__(
        self,
        symmetries: Symmetries,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        without: Collection[str] = (),
        buffers: dict[int, Tensor] | None = None,
    ) -> None:
        groups, device = groups_of(optimizer), main_device(parameters.values())
        self._symmetries = symmetries
        self._moved = {
            name: parameter
            for name, parameter in parameters.items()
            if id(parameter) in groups and parameter.grad is not None and name not in without
            if parameter.device == device
            if not left_out_as_sparse(name, parameter)
        }
        own = next(iter(self._moved.values())).device if self._moved else torch.device("cpu")
        self._device = observing_device(own)
        gradients = {name: on_observing_device(one.grad) for name, one in self._moved.items() if one.grad is not None}
        sums = slice_sums(symmetries.slices, self._weights(), gradients, self._device)
        scale = gradient_scale(optimizer)
        if scale is not None:  # fused optimizers unscale the gradients inside their step
            sums = sums._replace(inner=sums.inner / scale, gradient_sq=sums.gradient_sq / scale.square())
        self._sums = sums
        self._options = {name: groups[id(parameter)] for name, parameter in self._moved.items()}
        self._lr, self._decay = self._option("lr", math.nan), self._option("weight_decay", 0.0)
        joint = [m.slices.parameter for family in symmetries.families if is_one_vector(family) for m in family.members]
        self._buffers = {} if buffers is None else buffers
        self._copies = {name: self._copied(self._moved[name]) for name in dict.fromkeys(joint) if name in self._moved}

    def finished(self) -> SliceStep:
        """Return the step, with the parameters as they are now."""
        weights = self._weights()
        rows = [(old.reshape(1, -1), weights[n].detach().reshape(1, -1)) for n, old in self._copies.items()]
        products = dict(zip(self._copies, many_update_products(rows), strict=True)) if rows else {}
        after = squared_norms(self._symmetries.slices, weights, self._device)
        moved = self._of_each(lambda name: name in self._moved)
        return SliceStep(self._symmetries, self._sums, after, self._lr, self._decay, moved, products)

    def _weights(self) -> dict[str, Tensor]:
        """Return the parameters as they are now, on the device on which they are measured."""
        return {name: on_observing_device(parameter) for name, parameter in self._moved.items()}

    def _copied(self, parameter: nn.Parameter) -> Tensor:
        buffer = self._buffers.get(id(parameter))
        if buffer is None or (buffer.shape, buffer.device, buffer.dtype) != (
            parameter.shape,
            self._device,
            parameter.dtype,
        ):
            buffer = torch.empty_like(parameter, requires_grad=False, device=self._device)
            self._buffers[id(parameter)] = buffer
        return buffer.copy_(parameter.detach())

    def _option(self, name: str, missing: float) -> Tensor:
        """Return an option of the parameter group of each slice; the host does not wait for one that is on a device."""
        groups = {id(group): group for group in self._options.values()}
        known = {key: scalar(group.get(name, missing)) for key, group in groups.items()}
        values = {own: known[id(group)] for own, group in self._options.items()}
        slices = self._symmetries.slices
        return repeated([values.get(own.parameter, 0.0) for own in slices], [own.count for own in slices], self._device)

    def _of_each(self, value: Callable[[str], float]) -> Array:
        """Return a value of the parameter of each slice."""
        slices = self._symmetries.slices
        return np.repeat([value(own.parameter) for own in slices], [own.count for own in slices])


def is_one_vector(family: Family) -> bool:
    """Whether a family consists of whole parameters that are invariant as one vector."""
    whole = all(member.count == member.slices.count and member.exponent == 1 for member in family.members)
    return family.role == "invariant jointly" and family.count == 1 and whole
