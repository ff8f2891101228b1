"""Sums over the slices of parameters: ‖W_i‖², ⟨W_i, g_i⟩ and ‖g_i‖², of all slices that symmetries scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.products.compiled import fast, readable
from lightning_normgeo.geometry.rows import as_rows, on_observing_device
from lightning_normgeo.symmetries.slices import Slices

_BLOCK = {"cpu": 2**18}
"""Elements of a parameter that are read at once, by type of device: on a CPU their float64 copies stay in cache."""
_DEVICE_BLOCK = 2**21
"""The same on other devices, where a block takes a dozen kernels; its float64 copies take 64 MiB at most."""


class SliceSums(NamedTuple):
    """Sums over each slice, of shape ``(slices,)``; zero for slices of parameters that were not given."""

    weight_sq: Tensor
    """‖W_i‖²."""
    inner: Tensor
    """⟨W_i, g_i⟩."""
    gradient_sq: Tensor
    """‖g_i‖²."""


def slice_sums(
    slices: Sequence[Slices], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], device: torch.device
) -> SliceSums:
    """Return the sums over all slices, accumulated in float64.

    Args:
        slices: of all parameters, in the order of the result.
        weights: parameters by name.
        gradients: their gradients by name.
        device: of the result.

    Cost: one pass over weights and gradients, whatever the number of ways in which a parameter is sliced.
    """
    sums = _sums(slices, {n: (w, gradients[n]) for n, w in weights.items() if n in gradients}, device, 3)
    return SliceSums(*sums)


def squared_norms(slices: Sequence[Slices], weights: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Return ‖W_i‖² of all slices, as :func:`slice_sums` does."""
    return _sums(slices, {name: (weight,) for name, weight in weights.items()}, device, 1)[0]


def _sums(
    slices: Sequence[Slices], tensors: Mapping[str, tuple[Tensor, ...]], device: torch.device, products: int
) -> Tensor:
    by_parameter: dict[str, list[Slices]] = defaultdict(list)
    for own in slices:
        by_parameter[own.parameter].append(own)
    count = slices[-1].stop if slices else 0
    sums = torch.zeros(products, count, dtype=torch.float64, device=device)
    compiled = _by_compiled_loops(by_parameter, tensors)
    for name, several in by_parameter.items():
        if name in compiled:
            rows, columns = compiled[name]
            for own in several:
                sums[:, own.start : own.stop] = _of_lines(own, rows, columns)
        elif name in tensors:
            _add(sums, several, [on_observing_device(tensor.detach()) for tensor in tensors[name]])
    return sums


def _by_compiled_loops(
    by_parameter: Mapping[str, Sequence[Slices]], tensors: Mapping[str, tuple[Tensor, ...]]
) -> dict[str, list[Tensor]]:
    """Return the sums over rows and columns of those parameters that are sliced into them only; often all matrices."""
    matrices = {}
    for name, several in by_parameter.items():
        if name in tensors and all(_is_lines(own) for own in several):
            found = tuple(as_rows(on_observing_device(tensor), tensor.shape[0]) for tensor in tensors[name])
            if found[0].is_cpu and readable(found):
                matrices[name] = found
    elements = sum(found[0].numel() for found in matrices.values())
    sums = fast(lambda loops: loops.row_and_column_sums(list(matrices.values())), elements, "row_column_loops")
    return {} if sums is None else dict(zip(matrices, sums, strict=True))


def _is_lines(own: Slices) -> bool:
    """Whether the slices are the rows of a matrix, or sets of neighboring columns, or all of it."""
    varying = [axis for axis, size in enumerate(own.sizes) if size > 1]
    return len(own.shape) > 1 and varying in ([], [0], [1])


def _of_lines(own: Slices, rows: Tensor, columns: Tensor) -> Tensor:
    if own.sizes[0] > 1:
        return rows
    return columns.view(len(columns), own.count, -1).sum(2)


def _add(sums: Tensor, slices: Sequence[Slices], tensors: Sequence[Tensor]) -> None:
    """Add the products of a parameter to the sums, block by block along its first axis."""
    tensors = [tensor.reshape(tensor.shape or (1,)) for tensor in tensors]
    length = tensors[0].shape[0]
    block_size = _BLOCK.get(tensors[0].device.type, _DEVICE_BLOCK)
    rows = max(1, block_size * length // max(tensors[0].numel(), 1))
    for start in range(0, length, rows):
        block = [_wide(tensor[start : start + rows]) for tensor in tensors]
        pairs = [(a, b) for k, a in enumerate(block) for b in block[k:]]  # W·W, W·g, g·g
        for row, (a, b) in zip(sums, pairs, strict=True):
            product = (a * b.conj()).real if a.is_complex() else a * b
            for own in slices:
                _add_block(row[own.start : own.stop].view(own.sizes or (1,)), product, start)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in double precision; a complex number counts as the pair of its parts."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _add_block(target: Tensor, product: Tensor, start: int) -> None:
    """Add a block to the sums of one way to slice a parameter."""
    inside = [axis for axis, size in enumerate(target.shape) if size == 1 and product.shape[axis] > 1]
    part = product.sum(inside, keepdim=True) if inside else product
    place = target if target.shape[0] == 1 else target[start : start + product.shape[0]]
    place += part
