"""Parts of the parameters that this process holds, for models with and without sharding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from lightning_normgeo.geometry.rows import local_part
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.symmetries.slices import Slices
from lightning_normgeo.symmetries.spheres.blocks import NONE, BlockSlices


@dataclass(frozen=True)
class LocalParameters:
    """The parameters of a model, of which this process may hold some rows only.

    Attributes:
        parameters: parameters by name, as the optimizers hold them.
        first_row: number of the first row that this process holds, by name. Default: it holds all rows.
        add_up: function that adds up a tensor over all processes, in place. Default: this process holds everything.
    """

    parameters: Mapping[str, nn.Parameter]
    first_row: Mapping[str, int] | None = None
    add_up: Callable[[Tensor], None] | None = None

    @classmethod
    def of(cls, module: nn.Module) -> LocalParameters:
        """Return the parameters of a module that is not sharded."""
        return cls(by_clean_name(module.named_parameters()))

    def local(self, name: str) -> Tensor:
        """Return the part of a parameter that this process holds."""
        return local_part(self.parameters[name])


@dataclass(frozen=True)
class LocalSlices:
    """Slices of the local part of a parameter, numbered among all local slices, and the block of each.

    Attributes:
        parameter: the parameter, as the optimizers hold it.
        slices: slices of the local part.
        blocks: number of the block of each slice, on the device; :data:`.NONE` for slices of no block.
    """

    parameter: nn.Parameter
    slices: Slices
    blocks: Tensor

    def spread(self, values: Tensor, otherwise: float = 1.0) -> Tensor:
        """Return a value of each block in the shape in which it broadcasts to the local part."""
        spread = torch.where(self.blocks == NONE, otherwise, values[self.blocks.clamp_min(0)])
        return spread.view(self.slices.sizes)


def local_slices(several: Sequence[BlockSlices], own: LocalParameters, device: torch.device) -> list[LocalSlices]:
    """Return the slices of the local parts of parameters; parameters of which this process holds nothing are left out.

    A slice that runs along the rows is held in part, and its sums have to be added up over processes.
    """
    found: list[LocalSlices] = []
    start = 0
    for one in several:
        name = one.slices.parameter
        part = own.local(name)
        if not part.numel():
            continue
        slices, blocks = one.slices, torch.from_numpy(one.blocks)
        sizes = slices.sizes
        if sizes and sizes[0] > 1:  # its rows are numbered one after the other
            first, per_row = (own.first_row or {}).get(name, 0), prod(sizes[1:])
            blocks = blocks[first * per_row : (first + part.shape[0]) * per_row]
            sizes = (part.shape[0], *sizes[1:])
        slices = replace(slices, shape=tuple(part.shape), start=start, sizes=sizes)
        start = slices.stop
        found.append(LocalSlices(own.parameters[name], slices, blocks.to(device)))
    return found
