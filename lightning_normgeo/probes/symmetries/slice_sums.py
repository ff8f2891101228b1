"""Sums over the slices of parameters: ‖W_i‖², ⟨W_i, g_i⟩ and ‖g_i‖², of all slices that symmetries scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.symmetries.slices import Slices

_BLOCK = 2**18
"""Elements of a parameter that are read at once, so that their float64 copies stay in cache."""


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
    sums = torch.zeros(products, count, dtype=wide_dtype(device), device=device)
    for name, several in by_parameter.items():
        if name in tensors:
            _add(sums, several, [tensor.detach() for tensor in tensors[name]])
    return sums


def _add(sums: Tensor, slices: Sequence[Slices], tensors: Sequence[Tensor]) -> None:
    """Add the products of a parameter to the sums, block by block along its first axis."""
    tensors = [tensor.reshape(tensor.shape or (1,)) for tensor in tensors]
    length = tensors[0].shape[0]
    rows = max(1, _BLOCK * length // max(tensors[0].numel(), 1))
    for start in range(0, length, rows):
        block = [tensor[start : start + rows].to(sums.dtype) for tensor in tensors]
        pairs = [(a, b) for k, a in enumerate(block) for b in block[k:]]  # W·W, W·g, g·g
        for row, (a, b) in zip(sums, pairs, strict=True):
            product = a * b
            for own in slices:
                _add_block(row[own.start : own.stop].view(own.sizes or (1,)), product, start)


def _add_block(target: Tensor, product: Tensor, start: int) -> None:
    """Add a block to the sums of one way to slice a parameter."""
    inside = [axis for axis, size in enumerate(target.shape) if size == 1 and product.shape[axis] > 1]
    part = product.sum(inside, keepdim=True) if inside else product
    place = target if target.shape[0] == 1 else target[start : start + product.shape[0]]
    place += part
