"""Loops that sum over the rows and over the columns of matrices in one pass, compiled by numba, on a CPU.

Sums are float64 and do not depend on the number of threads, as in :mod:`.numba_kernels`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from numba import float64
from torch import Tensor

from lightning_normgeo.geometry.products.numba_kernels import Kernel, compiled_loop, share

_CHUNK = 2**18
"""Elements of the rows that one thread sums at a time, with column sums of their own."""


@compiled_loop
def _three(weight: Any, gradient: Any, rows: Any, columns: Any, start: int, stop: int) -> None:
    """Sums of W·W, W·g and g·g."""
    squares, inner, gradients = columns[0], columns[1], columns[2]
    for i in range(start, stop):
        w, g = weight[i], gradient[i]
        weight_sq = product = gradient_sq = 0.0
        for j in range(w.size):
            x, y = float64(w[j]), float64(g[j])
            xx, xy, yy = x * x, x * y, y * y
            weight_sq += xx
            product += xy
            gradient_sq += yy
            squares[j] += xx
            inner[j] += xy
            gradients[j] += yy
        rows[0, i], rows[1, i], rows[2, i] = weight_sq, product, gradient_sq


@compiled_loop
def _one(weight: Any, rows: Any, columns: Any, start: int, stop: int) -> None:
    """Sums of W·W."""
    squares = columns[0]
    for i in range(start, stop):
        w = weight[i]
        weight_sq = 0.0
        for j in range(w.size):
            x = float64(w[j])
            weight_sq += x * x
            squares[j] += x * x
        rows[0, i] = weight_sq


def row_and_column_sums(matrices: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    """Return the sums of products of matrices over each of their rows and over each of their columns.

    Args:
        matrices: for each result one matrix W, for the sums of W·W; or W and g of the same shape, for those of W·W,
            W·g and g·g.

    Returns:
        For each of them the sums over rows, of shape ``(products, rows)``, and over columns, ``(products, columns)``.
    """
    chunks: deque[tuple[Kernel, tuple[Any, ...]]] = deque()
    found: list[tuple[Tensor, Tensor]] = []
    for tensors in matrices:
        height, width = tensors[0].shape
        products = 3 if len(tensors) == 2 else 1
        step = max(1, _CHUNK // width)
        starts = range(0, height, step)
        rows = torch.empty(products, height, dtype=torch.float64)
        columns = torch.zeros(len(starts), products, width, dtype=torch.float64)
        arrays = [tensor.detach().numpy() for tensor in tensors]
        kernel = _three if products == 3 else _one
        for part, start in zip(columns.numpy(), starts, strict=True):
            chunks.append((kernel, (*arrays, rows.numpy(), part, start, min(start + step, height))))
        found.append((rows, columns))
    elements = sum(tensors[0].numel() for tensors in matrices)
    share(chunks, helpers=min(torch.get_num_threads(), len(chunks), elements // _CHUNK) - 1)
    return [[rows, columns.sum(0)] for rows, columns in found]
