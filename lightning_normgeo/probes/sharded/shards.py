"""Layout of a model sharded by ``fully_shard`` (FSDP2): the rows of each weight by process.

A parameter is sharded along dimension 0: each process holds some of its slices along that dimension, possibly none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_normgeo.geometry.rows import is_sharded, local_part
from lightning_normgeo.normalization.names import bias_of, clean_name, layer_name, named_weights
from lightning_normgeo.normalization.parametrizations import rows_dim


class RowRange(NamedTuple):
    """The position of this process's rows of one weight in a buffer for the rows of all processes.

    Rows along dimension 0 are whole, each on one process. Rows along another dimension are spread: every process holds
    a part of every row, and the buffer has a place for each part.
    """

    copies: int
    """Number of processes that hold a part of the same row."""
    total: int
    """Length of the buffer."""
    start: int
    """First place of this process."""
    stop: int
    """End of the places of this process, exclusive."""


@dataclass(frozen=True)
class ShardedWeight:
    """The layout of one sharded weight and of the bias of its layer, which all processes agree on.

    Attributes:
        name: name of the weight.
        parameter: the weight.
        dim: dimension along which its rows are read.
        row_range: position of the rows of this process.
        bias: position of this process's elements of the bias; None if the layer has no sharded bias.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    row_range: RowRange
    bias: RowRange | None


@dataclass(frozen=True)
class Shards:
    """The sharded parameters of a model, and the position of this process among all.

    Attributes:
        parameters: sharded parameters by name, which the optimizers hold. They have to be collected before any forward
            pass, during which the module holds unsharded ones.
        device: device of the collective.
        processes: number of processes.
        parts: number of processes over which one copy of a parameter is sharded.
        rank: index of the part that this process holds.
        counts: whether this process holds a part of the first copy. In HSDP other processes hold further copies of the
            same rows, which must not be counted again.
    """

    parameters: dict[str, nn.Parameter]
    device: torch.device
    processes: int = 1
    parts: int = 1
    rank: int = 0
    counts: bool = True

    def row_range(self, parameter: Tensor, dim: int = 0) -> RowRange:
        """Return the position of this process's rows of a parameter.

        Args:
            parameter: a sharded parameter.
            dim: dimension along which its rows are read.
        """
        rows = parameter.shape[dim]
        if dim:
            return RowRange(self.parts, self.parts * rows, self.rank * rows, (self.rank + 1) * rows)
        size = -(-rows // self.parts)  # rounded up, as in torch.chunk: the last processes may hold fewer rows or none
        return RowRange(1, rows, min(self.rank * size, rows), min((self.rank + 1) * size, rows))

    def weights(self, module: nn.Module) -> list[ShardedWeight]:
        """Return the layouts of the sharded weights, which are the same and in the same order on all processes."""
        layers = {clean_name(name): layer for name, layer in module.named_modules()}
        found = []
        for name, parameter in self.named_weights(module):
            owner, bias = layers.get(layer_name(name)), self.parameters.get(bias_of(name))
            dim = 0 if owner is None else rows_dim(owner)
            places = None if bias is None or not is_sharded(bias) else self.row_range(bias)
            found.append(ShardedWeight(name, parameter, dim, self.row_range(parameter, dim), places))
        return found

    def named_weights(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return the names and sharded parameters that have rows, including frozen ones."""
        named = [(name, self.parameters[name]) for name, _ in named_weights(module, frozen=True)]
        return [(name, parameter) for name, parameter in named if is_sharded(parameter)]


def local_rows(tensor: Tensor, dim: int = 0) -> Tensor:
    """Return this process's shard of a parameter as a matrix of rows; each element of a vector is a row."""
    part = local_part(tensor)
    return part.unsqueeze(1) if part.ndim == 1 else part.movedim(dim, 0).flatten(1)
