"""Spheres of scale-invariant blocks: projection of a module onto them, together with its optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.rows import as_rows, wide_dtype
from lightning_normgeo.normalization.names import bias_of, by_clean_name, clean_name, layer_name
from lightning_normgeo.symmetries.batch_norms import with_statistics
from lightning_normgeo.symmetries.equations.exponents import Ids
from lightning_normgeo.symmetries.optimizer_states import check_states, scale_states
from lightning_normgeo.symmetries.slice_sums import squared_norms
from lightning_normgeo.symmetries.slices import Slices
from lightning_normgeo.symmetries.symmetries import Symmetries, sparse_tensor
from lightning_normgeo.symmetries.transformation import check_parameter, statistic_exponents

_NONE = -1


@dataclass(frozen=True)
class _Part:
    """The slices of one parameter that blocks scale, with the block of each slice; -1 for slices of none."""

    slices: Slices
    blocks: Tensor


class Spheres:
    r"""The spheres on which the scale-invariant blocks of a module lie, and the projection onto them.

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

    Attributes:
        generators: numbers of the generators that are blocks. Left out are those that scale some slices faster than
            others, and those that overlap with a block before them.
        radii: r of each block, in float64.

    Raises:
        ConfigurationError: for symmetries of another module, for weights stored in half precision, and where it is not
            known how running statistics scale.
    """

    def __init__(self, symmetries: Symmetries, module: nn.Module, radii: Tensor | None = None) -> None:
        self._module, self._symmetries = module, symmetries
        self._parameters = by_clean_name(module.named_parameters())
        self.generators, self._block_of_slice = _blocks(symmetries)
        self._used = [own for own in symmetries.slices if (self._block_of_slice[own.start : own.stop] != _NONE).any()]
        self._check()
        self._device = next(iter(self._parameters.values())).device
        inside = np.flatnonzero(self._block_of_slice != _NONE)
        self._inside = torch.from_numpy(inside).to(self._device)
        self._block_inside = torch.from_numpy(self._block_of_slice[inside]).to(self._device)
        blocks = torch.from_numpy(self._block_of_slice).to(self._device)
        self._parts = [_Part(own, blocks[own.start : own.stop]) for own in self._used]
        self._biases = self._dead_biases()
        self._statistics = self._channels()
        norms = self.norms()
        self.radii = norms if radii is None else radii.to(norms)
        if self.radii.shape != norms.shape:
            raise ConfigurationError(
                f"{len(self.radii)} radii were given for {len(norms)} scale-invariant blocks. Give one for each, or "
                "none to keep the norms that the blocks have."
            )

    def __len__(self) -> int:
        return len(self.generators)

    def norms(self) -> Tensor:
        """Return ‖W‖ of each block, in float64.

        Cost: one pass over the parameters of the blocks.
        """
        weights = {own.parameter: self._parameters[own.parameter].detach() for own in self._used}
        by_slice = squared_norms(self._used, weights, self._device)
        return by_slice.new_zeros(len(self)).index_add(0, self._block_inside, by_slice[self._inside]).sqrt()

    @torch.no_grad()
    def project(self, optimizer: Optimizer | None = None) -> Tensor:
        """Bring every block back to its sphere, in place, and return the factor a of each block.

        Args:
            optimizer: whose state is transported. Blocks of which it moves no parameter stay as they are. Default: all
                blocks are projected, and no state is transported.

        Raises:
            ConfigurationError: for a state that is not known; nothing is changed then.

        Cost: two passes over the parameters of the blocks, and one over the states of the optimizer.
        """
        norms = self.norms()
        factors = torch.where(norms > 0, self.radii / norms, 1.0)
        if optimizer is not None:
            factors = torch.where(self._moved_by(optimizer), factors, 1.0)
        scaled = [(self._parameters[own.slices.parameter], [self._spread(own, factors)]) for own in self._parts]
        scaled += [(self._parameters[own.slices.parameter], [self._spread(own, factors)]) for own in self._biases]
        if optimizer is not None:
            check_states(optimizer, scaled)
            scale_states(optimizer, scaled, _multiply)
        for parameter, values in scaled:
            _multiply(parameter, values, 1.0)
        for (mean, variance), matrix in self._statistics:
            scale = torch.sparse.mm(matrix, factors.log().unsqueeze(1)).squeeze(1).exp()
            mean.mul_(scale.to(mean.dtype))
            variance.mul_(scale.square().to(variance.dtype))
        return factors

    def _spread(self, part: _Part, factors: Tensor) -> Tensor:
        """Return the factor of each slice of a parameter, in the shape in which it broadcasts to it."""
        values = torch.where(part.blocks == _NONE, 1.0, factors[part.blocks.clamp_min(0)])
        return values.view(part.slices.sizes or (1,))

    def _moved_by(self, optimizer: Optimizer) -> Tensor:
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        moved = torch.zeros(len(self), dtype=torch.bool, device=self._device)
        for part in self._parts:
            if id(self._parameters[part.slices.parameter]) in own:
                moved[part.blocks[part.blocks != _NONE]] = True
        return moved

    def _check(self) -> None:
        for own in self._used:
            check_parameter(self._parameters, own.parameter, own.shape)
            dtype = self._parameters[own.parameter].dtype
            if dtype in (torch.float16, torch.bfloat16):
                raise ConfigurationError(
                    f"{own.parameter} is stored in {dtype}, whose rounding is as large as a step: its norm "
                    "cannot be held. Store the weights in float32, for instance with precision='bf16-mixed'."
                )

    def _dead_biases(self) -> list[_Part]:
        """Return the biases that have no effect in training and belong to a layer with blocks."""
        still = self._symmetries.exponents[self._symmetries.in_role("without effect")].indices
        dead = set(still.tolist())
        layers = {clean_name(name): layer for name, layer in self._module.named_modules()}
        found = []
        for weight in self._used:
            for own in self._symmetries.slices:
                if own.parameter == bias_of(weight.parameter) and dead.issuperset(range(own.start, own.stop)):
                    blocks = self._by_output(weight, layers.get(layer_name(weight.parameter)))
                    if blocks is not None and len(blocks) == own.count:
                        found.append(_Part(own, blocks.to(self._device)))
        return found

    def _by_output(self, weight: Slices, layer: nn.Module | None) -> Tensor | None:
        """Return the block of each output channel of a weight; None if channels have several."""
        blocks = torch.from_numpy(self._block_of_slice[weight.start : weight.stop]).view(weight.sizes)
        blocks = blocks.expand(*weight.shape[:2], *blocks.shape[2:])
        dim, groups = (1, layer.groups) if isinstance(layer, _ConvTransposeNd) else (0, 1)
        inside = as_rows(blocks, weight.shape[dim] * groups, dim, groups)
        return inside[:, 0] if bool((inside == inside[:, :1]).all()) else None

    def _channels(self) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Return running statistics, each with the exponents of its channels in each block."""
        there, found = with_statistics(self._module), []
        for name, matrix in (statistic_exponents(self._symmetries, self._module) if len(self) else {}).items():
            exponents = sparse_tensor(matrix[self.generators].T)
            pair = there[name].running_mean, there[name].running_var
            found.append((pair, exponents.to(self._device, wide_dtype(self._device))))
        return found  # type: ignore[return-value]


def _blocks(symmetries: Symmetries) -> tuple[Ids, Ids]:
    """Return the generators that are blocks, and the block of each slice."""
    block_of_slice = np.full(symmetries.exponents.shape[1], _NONE)
    owner = np.repeat(np.arange(len(symmetries.slices)), [own.count for own in symmetries.slices])
    taken: dict[str, int] = {}
    generators: list[int] = []
    invariant = [symmetries.in_role("invariant alone"), symmetries.in_role("invariant jointly")]
    for generator in np.concatenate(invariant):
        row = slice(symmetries.exponents.indptr[generator], symmetries.exponents.indptr[generator + 1])
        columns, exponents = symmetries.exponents.indices[row], symmetries.exponents.data[row]
        ways = {symmetries.slices[own].parameter: int(own) for own in np.unique(owner[columns])}
        alone = (block_of_slice[columns] == _NONE).all() and len(ways) == len(np.unique(owner[columns]))
        if alone and (exponents == 1).all() and all(taken.get(name, own) == own for name, own in ways.items()):
            taken |= ways
            block_of_slice[columns] = len(generators)
            generators.append(int(generator))
    return np.array(generators, dtype=np.int64), block_of_slice


def _multiply(tensor: Tensor, factors: Sequence[Tensor], power: float) -> None:
    for factor in factors:
        tensor.mul_((factor if power == 1 else factor**power).to(tensor.dtype.to_real()))
