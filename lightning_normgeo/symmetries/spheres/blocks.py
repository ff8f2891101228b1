"""Scale-invariant blocks of a network: the slices of its parameters that one symmetry scales as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_normgeo.geometry.rows import as_rows
from lightning_normgeo.normalization.names import bias_of, clean_name, layer_name
from lightning_normgeo.symmetries.equations.exponents import Ids, Mask
from lightning_normgeo.symmetries.slices import Slices
from lightning_normgeo.symmetries.symmetries import Symmetries
from lightning_normgeo.symmetries.transformations.transformation import statistic_exponents

NONE = -1
"""Number of the block of slices that belong to none."""


@dataclass(frozen=True)
class BlockSlices:
    """Slices of one parameter, and the block of each.

    Attributes:
        slices: the slices.
        blocks: number of the block of each slice, of shape ``(slices,)``; :data:`NONE` for slices of no block.
    """

    slices: Slices
    blocks: Ids

    def only(self, number: Ids) -> BlockSlices:
        """Return the same slices with other numbers of blocks: ``number[old]``."""
        return replace(self, blocks=np.where(self.blocks == NONE, NONE, number[self.blocks]))


@dataclass(frozen=True)
class Blocks:
    """Disjoint scale-invariant blocks, and what else a change of their norms concerns.

    Attributes:
        generators: numbers of the symmetries that scale the blocks, of shape ``(blocks,)``.
        weights: slices of the parameters that consist of blocks.
        biases: biases that have no effect in training and belong to layers with blocks.
        statistics: exponents of the channels of batch normalizations, ``(channels, blocks)``, by module path.
    """

    generators: Ids
    weights: tuple[BlockSlices, ...]
    biases: tuple[BlockSlices, ...]
    statistics: Mapping[str, csr_array]

    def __len__(self) -> int:
        return len(self.generators)

    def only(self, chosen: Mask) -> Blocks:
        """Return some of the blocks, numbered anew.

        Args:
            chosen: whether to keep each block, of shape ``(blocks,)``.
        """
        number = np.where(chosen, np.cumsum(chosen) - 1, NONE)
        kept = np.flatnonzero(chosen)
        return Blocks(
            self.generators[kept],
            _used([one.only(number) for one in self.weights]),
            _used([one.only(number) for one in self.biases]),
            {name: matrix[:, kept] for name, matrix in self.statistics.items() if matrix[:, kept].nnz},
        )

    def places(self) -> dict[str, Ids]:
        """Return the numbers of the blocks, in the order of their first slices, by the parameter of these slices."""
        first: dict[str, list[Ids]] = {}
        seen = np.zeros(len(self), bool)
        for one in self.weights:
            inside = one.blocks[one.blocks != NONE]
            found, at = np.unique(inside, return_index=True)
            ordered = found[np.argsort(at)]
            fresh = ordered[~seen[ordered]]
            seen[fresh] = True
            first.setdefault(one.slices.parameter, []).append(fresh)
        return {name: np.concatenate(some) for name, some in first.items() if sum(map(len, some))}


def find_blocks(symmetries: Symmetries, module: nn.Module) -> Blocks:
    """Return the scale-invariant blocks of a module.

    Left out are symmetries that scale some slices faster than others, those that overlap with a block before them, and
    those of a single number, which has no direction to move in.

    Raises:
        ConfigurationError: where it is not known how running statistics scale.
    """
    generators, block_of_slice = _disjoint(symmetries)
    weights = _used([BlockSlices(own, block_of_slice[own.start : own.stop]) for own in symmetries.slices])
    statistics = {}
    for name, matrix in (statistic_exponents(symmetries, module) if len(generators) else {}).items():
        exponents = matrix[generators].T.tocsr()
        if exponents.nnz:
            statistics[name] = exponents
    # A bias in front of running statistics moves with them. Where a weight is normalized by itself, as in weight
    # normalization, its norm does not reach them.
    moving = np.zeros(len(generators), bool)
    for matrix in statistics.values():
        moving[matrix.indices] = True
    number = np.where(moving, np.arange(len(generators)), NONE)
    linear = _used([one.only(number) for one in weights])
    return Blocks(generators, weights, tuple(_dead_biases(symmetries, linear, module)), statistics)


def _used(several: Sequence[BlockSlices]) -> tuple[BlockSlices, ...]:
    return tuple(one for one in several if (one.blocks != NONE).any())


def _disjoint(symmetries: Symmetries) -> tuple[Ids, Ids]:
    """Return the generators that are blocks, and the block of each slice."""
    block_of_slice = np.full(symmetries.exponents.shape[1], NONE)
    owner = np.repeat(np.arange(len(symmetries.slices)), [own.count for own in symmetries.slices])
    taken: dict[str, int] = {}
    generators: list[int] = []
    invariant = [symmetries.in_role("invariant alone"), symmetries.in_role("invariant jointly")]
    for generator in np.concatenate(invariant):
        if symmetries.scales_one_number[generator]:
            continue
        row = slice(symmetries.exponents.indptr[generator], symmetries.exponents.indptr[generator + 1])
        columns, exponents = symmetries.exponents.indices[row], symmetries.exponents.data[row]
        ways = {symmetries.slices[own].parameter: int(own) for own in np.unique(owner[columns])}
        alone = (block_of_slice[columns] == NONE).all() and len(ways) == len(np.unique(owner[columns]))
        if alone and (exponents == 1).all() and all(taken.get(name, own) == own for name, own in ways.items()):
            taken |= ways
            block_of_slice[columns] = len(generators)
            generators.append(int(generator))
    return np.array(generators, dtype=np.int64), block_of_slice


def _dead_biases(symmetries: Symmetries, weights: Sequence[BlockSlices], module: nn.Module) -> list[BlockSlices]:
    """Return the biases that have no effect in training and belong to a layer with blocks."""
    still = symmetries.exponents[symmetries.in_role("without effect")].indices
    dead = set(still.tolist())
    layers = {clean_name(name): layer for name, layer in module.named_modules()}
    found: list[BlockSlices] = []
    for weight in weights:
        for own in symmetries.slices:
            if own.parameter == bias_of(weight.slices.parameter) and dead.issuperset(range(own.start, own.stop)):
                blocks = _by_output(weight, layers.get(layer_name(weight.slices.parameter)), own.count)
                if blocks is not None and len(blocks) == own.count and not _is_known(found, own, blocks):
                    found.append(BlockSlices(own, blocks))
    return found


def _is_known(found: Sequence[BlockSlices], own: Slices, blocks: Ids) -> bool:
    """Whether another weight of the same layer and blocks has brought these slices of its bias."""
    return any(one.slices is own and np.array_equal(one.blocks, blocks) for one in found)


def _by_output(weight: BlockSlices, layer: nn.Module | None, outputs: int) -> Ids | None:
    """Return the block of each output channel of a weight; None if channels have several."""
    shape = weight.slices.shape
    if not shape:  # one number scales all channels, as the gain of a weight that is normalized as a whole
        return np.full(outputs, weight.blocks[0])
    blocks = torch.from_numpy(weight.blocks).view(weight.slices.sizes)
    blocks = blocks.expand(*shape[:2], *blocks.shape[2:])
    dim, groups = (1, layer.groups) if isinstance(layer, _ConvTransposeNd) else (0, 1)
    inside = as_rows(blocks, shape[dim] * groups, dim, groups)
    return inside[:, 0].numpy() if bool((inside == inside[:, :1]).all()) else None
