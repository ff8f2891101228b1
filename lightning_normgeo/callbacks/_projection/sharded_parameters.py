"""Parameters of a sharded model as spheres need them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_normgeo.geometry.rows import is_sharded
from lightning_normgeo.probes.sharded.shards import Shards
from lightning_normgeo.symmetries.spheres.local_parts import LocalParameters


def local_parameters(module: nn.Module, shards: Shards | None) -> LocalParameters:
    """Return the parameters of a model with the rows that this process holds, and the sum over processes."""
    if shards is None:
        return LocalParameters.of(module)
    sharded = {name: parameter for name, parameter in shards.parameters.items() if is_sharded(parameter)}
    first = {name: shards.row_range(parameter).start for name, parameter in sharded.items()}

    def add_up(sums: Tensor) -> None:
        if not shards.counts:  # a further copy of rows that another process counts
            sums.zero_()
        torch.distributed.all_reduce(sums)

    return LocalParameters(shards.parameters, first, add_up)
