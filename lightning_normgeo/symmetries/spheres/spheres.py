"""Spheres of scale-invariant blocks: steps of a module that stay on them, together with its optimizer's state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.rows import local_part, observing_device, stored_like
from lightning_normgeo.symmetries.charges.slice_sums import SliceSums, slice_sums, squared_norms
from lightning_normgeo.symmetries.equations.exponents import Ids, Mask
from lightning_normgeo.symmetries.spheres.blocks import NONE, Blocks, find_blocks
from lightning_normgeo.symmetries.spheres.local_parts import LocalParameters, local_slices
from lightning_normgeo.symmetries.symmetries import Symmetries, sparse_tensor
from lightning_normgeo.symmetries.transformations.batch_norms import with_statistics
from lightning_normgeo.symmetries.transformations.optimizer_states import (
    averages_of_gradients,
    check_states,
    scale_states,
)
from lightning_normgeo.symmetries.transformations.transformation import check_parameter


class StepSums(NamedTuple):
    """Sums over each block in one step, of shape ``(blocks,)``."""

    weight_sq: Tensor
    """‖W‖² before the step."""
    inner: Tensor
    """⟨W, D⟩ with the update D."""
    update_sq: Tensor
    """‖D‖²."""
    direction_sq: Tensor
    """‖D/η‖², the squared length of the direction that the optimizer takes."""


class Spheres:
    r"""The spheres on which the scale-invariant blocks of a module lie, and steps that stay on them.

    A block is what one symmetry scales as a whole: a filter, a group of filters, a layer, or all weights that write
    into a residual stream. Its direction alone decides the function. :meth:`project` multiplies each block W by
    a = r/‖W‖, so that its norm is the radius r again, and transports what belongs to it:

    - averages of gradients by 1/a and averages of their squares by 1/a², as gradients scale (a momentum that is left
      behind changes the direction of all later steps);
    - running means of batch normalizations by a, and running variances by a²; a bias of the same layer that has no
      effect in training is multiplied by a as well, so that this is exact.

    Projected after every step, training with learning rate η moves directions exactly as free training with
    η·(‖W‖/r)² under SGD with momentum, and with η·‖W‖/r under Adam and Lion, block by block. The radial part of
    decoupled weight decay λ does not vanish: it acts as the learning rate η/(1 − ηλ), and momentum μ as μ(1 − ηλ).

    Args:
        symmetries: of the module in training mode, as from :func:`scale_symmetries`.
        module: the module.
        radii: r of each block, in the order of :attr:`generators`. Default: the norms that the blocks have now.
        parameters: parameters as the optimizers hold them, for a sharded module. Default: those of the module.

    Attributes:
        generators: numbers of the generators that are blocks. Left out are those that scale some slices faster than
            others, those that overlap with a block before them, and those of a single number.
        radii: r of each block, in float64.

    Raises:
        ConfigurationError: for symmetries of another module, for weights stored in half precision, and where it is not
            known how running statistics scale.
    """

    def __init__(
        self,
        symmetries: Symmetries,
        module: nn.Module,
        radii: Tensor | None = None,
        parameters: LocalParameters | None = None,
    ) -> None:
        self._module = module
        self._own = LocalParameters.of(module) if parameters is None else parameters
        self._place(find_blocks(symmetries, module))
        norms = self.norms()
        self.radii = norms if radii is None else radii.to(norms)
        if self.radii.shape != norms.shape:
            raise ConfigurationError(
                f"{len(self.radii)} radii were given for {len(norms)} scale-invariant blocks. Give one for each, or "
                "none to keep the norms that the blocks have."
            )

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def generators(self) -> Ids:
        """Numbers of the generators that are blocks."""
        return self.blocks.generators

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that consist of blocks, in part or as a whole."""
        return list(dict.fromkeys(one.slices.parameter for one in self.blocks.weights))

    def only(self, chosen: Mask) -> Spheres:
        """Return the spheres of some blocks.

        Args:
            chosen: whether to keep each block, of shape ``(blocks,)``.
        """
        some = copy.copy(self)
        some._place(self.blocks.only(chosen))
        some.radii = self.radii[torch.from_numpy(chosen).to(self.radii.device)]
        return some

    def norms(self) -> Tensor:
        """Return ‖W‖ of each block, in float64.

        Cost: one pass over the parameters of the blocks.
        """
        by_slice = squared_norms(self._slices, self._weights(), self._device)
        return self._by_block(by_slice.unsqueeze(0))[0].sqrt()

    @torch.no_grad()
    def project(
        self,
        optimizers: Optimizer | Sequence[Optimizer] | None = None,
        transport: bool = True,
        gradients: bool = False,
    ) -> Tensor:
        """Bring every block back to its sphere, in place, and return the factor a of each block.

        Args:
            optimizers: whose state is transported. Blocks of which they move no parameter stay as they are. Default:
                all blocks are projected, and no state is transported.
            transport: whether to transport the state at all.
            gradients: whether to scale ``.grad`` as well, for a projection between a backward pass and its step.

        Raises:
            ConfigurationError: for a state that is not known; nothing is changed then.

        Cost: two passes over the parameters of the blocks, and one over the states of the optimizer.
        """
        several = _several(optimizers)
        norms = self.norms()
        factors = torch.where(norms > 0, self.radii / norms, 1.0)
        held = {id(parameter) for one in several for group in one.param_groups for parameter in group["params"]}
        if optimizers is not None and any(id(part.parameter) not in held for part in self._parts):
            # rarely needed, and a copy to the device for each parameter
            factors = torch.where(torch.stack([self.moved_by(one) for one in several]).any(0), factors, 1.0)
        scaled = [(part.parameter, [part.spread(factors)]) for part in (*self._parts, *self._biases)]
        if transport:
            for one in several:
                check_states(one, scaled)
            for one in several:
                scale_states(one, scaled, _multiply)
        for parameter, values in scaled:
            _multiply(parameter, values, 1.0)
            if gradients and parameter.grad is not None:
                _multiply(parameter.grad, values, -1.0)
        for mean, variance, exponents in self._statistics:
            scale = torch.sparse.mm(exponents, factors.log().unsqueeze(1)).squeeze(1).exp()
            mean.mul_(stored_like(mean, scale))
            variance.mul_(stored_like(variance, scale.square()))
        return factors

    @torch.no_grad()
    def make_tangential(self, optimizers: Optimizer | Sequence[Optimizer]) -> None:
        """Remove the radial part of the gradients of blocks, and of the averages of gradients in optimizers, in place.

        Cost: two passes over the parameters of the blocks, and over each of these tensors.
        """
        self._remove_radial({id(part.parameter): part.parameter.grad for part in self._parts})
        for optimizer in _several(optimizers):
            averages = {id(part.parameter): averages_of_gradients(optimizer, part.parameter) for part in self._parts}
            for number in range(max(map(len, averages.values()), default=0)):
                self._remove_radial({key: some[number] for key, some in averages.items() if number < len(some)})

    @torch.no_grad()
    def copied(self) -> dict[str, Tensor]:
        """Return a copy of the parameters of the blocks by name, for :meth:`turn`."""
        return {name: part.clone() for name, part in self._weights().items()}

    @torch.no_grad()
    def turn(
        self,
        before: Mapping[str, Tensor],
        step: Callable[[StepSums, Tensor], tuple[Tensor, Tensor]],
        rates: Mapping[int, float] | None = None,
    ) -> None:
        """Replace a step of the parameters by a step on the spheres, in place.

        Args:
            before: the parameters before the step, from :meth:`copied`.
            step: function of the sums over blocks and of the radii that returns coefficients (α, β): the blocks become
                αW + βD, with W before the step and its update D.
            rates: learning rate η of each parameter by its id. Default: 1.

        Cost: five passes over the parameters of the blocks.
        """
        updates = self._weights()
        for name, weight in updates.items():
            weight.sub_(before[name])
        by_slice = slice_sums(self._slices, before, updates, self._device)
        eta = self._of_slices(rates or {})
        direction_sq = torch.where(eta > 0, by_slice.gradient_sq / eta.square(), 0.0)
        sums = StepSums(*self._by_block(torch.stack([*by_slice, direction_sq])))
        alpha, beta = step(sums, self.radii)
        for part in self._parts:
            weight, old = local_part(part.parameter), before[part.slices.parameter]
            weight.mul_(stored_like(weight, part.spread(beta)))
            weight.addcmul_(old, stored_like(weight, part.spread(alpha)))

    def moved_by(self, optimizer: Optimizer) -> Tensor:
        """Return for each block whether an optimizer moves one of its parameters, or more, as a mask."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        moved = torch.zeros(len(self), dtype=torch.bool, device=self._device)
        for one in self.blocks.weights:
            if id(self._own.parameters[one.slices.parameter]) in own:
                moved[torch.from_numpy(one.blocks[one.blocks != NONE]).to(self._device)] = True
        return moved

    def of_blocks(self, values: Mapping[int, float]) -> Tensor:
        """Return a value of a parameter of each block, given values of parameters by id."""
        found = torch.ones(len(self), dtype=self.radii.dtype, device=self._device)
        for one in self.blocks.weights:
            value = values.get(id(self._own.parameters[one.slices.parameter]), 1.0)
            found[torch.from_numpy(one.blocks[one.blocks != NONE]).to(self._device)] = value
        return found

    def _place(self, blocks: Blocks) -> None:
        """Bring the numbers of the blocks to the device of the parameters."""
        self.blocks = blocks
        for one in blocks.weights:
            self._check(one.slices.parameter, one.slices.shape)
        self._device = observing_device(next(iter(self._own.parameters.values())).device)
        self._parts = local_slices(blocks.weights, self._own, self._device)
        self._biases = local_slices(blocks.biases, self._own, self._device)
        self._slices = [part.slices for part in self._parts]
        self._block_of_slice = torch.cat([part.blocks for part in self._parts] or [torch.zeros(0, dtype=torch.int64)])
        self._inside = (self._block_of_slice != NONE).nonzero().squeeze(1)
        self._statistics = list(self._channels())

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        check_parameter(self._own.parameters, name, shape)
        dtype = self._own.parameters[name].dtype
        if dtype in (torch.float16, torch.bfloat16):
            raise ConfigurationError(
                f"{name} is stored in {dtype}, whose rounding is as large as a step: its norm cannot be held. Store "
                "the weights in float32, for instance with precision='bf16-mixed'."
            )

    def _channels(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield running means and variances, with the exponents of their channels in each block."""
        there = with_statistics(self._module)
        for name, matrix in self.blocks.statistics.items():
            exponents = sparse_tensor(matrix).to(self._device, torch.float64)
            yield there[name].running_mean, there[name].running_var, exponents  # type: ignore[misc]

    def _weights(self) -> dict[str, Tensor]:
        return {part.slices.parameter: local_part(part.parameter) for part in self._parts}

    def _of_slices(self, values: Mapping[int, float]) -> Tensor:
        """Return a value of the parameter of each slice, by its id."""
        counts = torch.tensor([part.slices.count for part in self._parts], dtype=torch.int64)
        own = torch.tensor([values.get(id(part.parameter), 1.0) for part in self._parts], dtype=torch.float64)
        return own.repeat_interleave(counts).to(self._device, torch.float64)

    def _by_block(self, by_slice: Tensor) -> Tensor:
        """Return the sums over blocks and processes of several sums over slices, ``(sums, slices)``."""
        sums = by_slice.new_zeros(len(by_slice), len(self))
        sums.index_add_(1, self._block_of_slice[self._inside], by_slice[:, self._inside])
        if self._own.add_up is not None:
            self._own.add_up(sums)
        return sums

    def _remove_radial(self, tensors: Mapping[int, Tensor | None]) -> None:
        """Subtract from tensors, by the id of their parameter, the part along the blocks."""
        local = {key: local_part(tensor) for key, tensor in tensors.items() if tensor is not None}
        by_name = {p.slices.parameter: local[id(p.parameter)] for p in self._parts if id(p.parameter) in local}
        weights = {name: weight for name, weight in self._weights().items() if name in by_name}
        sums = SliceSums(*self._by_block(torch.stack(slice_sums(self._slices, weights, by_name, self._device))))
        shares = torch.where(sums.weight_sq > 0, sums.inner / sums.weight_sq, 0.0)
        for part in self._parts:
            tensor = local.get(id(part.parameter))
            if tensor is not None:
                share = part.spread(shares, 0.0)
                tensor.addcmul_(weights[part.slices.parameter].to(tensor.dtype), stored_like(tensor, share), value=-1)


def _several(optimizers: Optimizer | Sequence[Optimizer] | None) -> Sequence[Optimizer]:
    if optimizers is None:
        return ()
    return (optimizers,) if isinstance(optimizers, Optimizer) else optimizers


def _multiply(tensor: Tensor, factors: Sequence[Tensor], power: float) -> None:
    local = local_part(tensor)
    for factor in factors:
        local.mul_(stored_like(local, factor if power == 1 else factor**power))
