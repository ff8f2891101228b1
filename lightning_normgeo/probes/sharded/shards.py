"""The weights of a model that ``fully_shard`` (FSDP2) has divided: who has which rows.

A parameter is divided along dimension 0: each process has whole rows of it, some processes possibly none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_normgeo.normalization.names import bias_of, clean_name, layer_name, named_weights
from lightning_normgeo.normalization.parametrizations import rows_dim


class RowRange(NamedTuple):
    """Where the rows of this process are among those of all, each of which has a place of its own.

    Along another dimension than 0 every process has a part of every row, which has a place for each of them.
    """

    copies: int
    """How many processes have a part of one row."""
    total: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardedWeight:
    """One weight, and the bias of its layer, as all processes have to agree on before anything is measured.

    Attributes:
        name: its name.
        parameter: the weight.
        dim: the dimension that its rows are read along.
        row_range: where its rows are.
        bias: where the elements of the layer's bias are; None where it has none that is divided too.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    row_range: RowRange
    bias: RowRange | None


@dataclass(frozen=True)
class Shards:
    """The parameters of a divided model as the optimizers have them, and this process among the others.

    Attributes:
        parameters: by name; taken when the module has them, that is before any forward pass.
        device: of the collective.
        processes: how many there are.
        parts: over how many of them one copy of a parameter is divided.
        rank: which part this process has.
        counts: whether it is of the first copy; where there are several (HSDP) the others hold the same.
    """

    parameters: dict[str, nn.Parameter]
    device: torch.device
    processes: int = 1
    parts: int = 1
    rank: int = 0
    counts: bool = True

    def row_range(self, parameter: Tensor, dim: int = 0) -> RowRange:
        """Return where the rows of a parameter are, divided as ``torch.chunk`` does it."""
        rows = parameter.shape[dim]
        if dim:
            return RowRange(self.parts, self.parts * rows, self.rank * rows, (self.rank + 1) * rows)
        size = -(-rows // self.parts)
        return RowRange(1, rows, min(self.rank * size, rows), min((self.rank + 1) * size, rows))

    def weights(self, module: nn.Module) -> list[ShardedWeight]:
        """Return the divided weights, in the same order on all processes; nothing depends on what one of them saw."""
        layers = {clean_name(name): layer for name, layer in module.named_modules()}
        found = []
        for name, parameter in self.named_weights(module):
            owner, bias = layers.get(layer_name(name)), self.parameters.get(bias_of(name))
            dim = 0 if owner is None else rows_dim(owner)
            places = None if bias is None or not is_sharded(bias) else self.row_range(bias)
            found.append(ShardedWeight(name, parameter, dim, self.row_range(parameter, dim), places))
        return found

    def named_weights(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return the divided parameters that have rows, frozen ones too."""
        named = [(name, self.parameters[name]) for name, _ in named_weights(module, frozen=True)]
        return [(name, parameter) for name, parameter in named if is_sharded(parameter)]


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, without importing what defines it."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor; no collective."""
    part: Any = tensor.detach()
    return part.to_local() if is_sharded(part) else part  # type: ignore[no-any-return]


def local_rows(tensor: Tensor, dim: int = 0) -> Tensor:
    """View what this process has of a parameter as a matrix of rows; of a vector each element is one."""
    part = local_part(tensor)
    return part.unsqueeze(1) if part.ndim == 1 else part.movedim(dim, 0).flatten(1)
