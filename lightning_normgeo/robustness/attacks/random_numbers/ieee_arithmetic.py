"""Square roots and lengths with the same bits on every device.

They consist of additions, multiplications and divisions alone, which IEEE 754 rounds in one way only, in a fixed order.
Each is an operation by itself, so that no compiler fuses two of them. Square roots of torch are not always the nearest
number on a CPU, where Intel's library takes them, and the order of its sums differs by device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Heron(NamedTuple):
    """Heron's method for a floating-point type.

    Attributes:
        bits: the integer type of the same width.
        guess: number that, added to half of the bits of x, gives those of a number at most 3.5 % from √x.
        steps: number of steps, each of which turns an error e into e²/2, until only rounding is left.
    """

    bits: torch.dtype
    guess: int
    steps: int


HERON = {
    torch.float32: Heron(torch.int32, 0x1FBD1DF5, 3),
    torch.float64: Heron(torch.int64, 0x1FF7A3BEA91D9B1B, 4),
}


def square_root(x: Tensor) -> Tensor:
    """Return square roots of normal numbers > 0, float32 or float64, to one unit in the last place; 0 for 0."""
    heron = HERON[x.dtype]
    root = (x.view(heron.bits) >> 1).add_(heron.guess).view(x.dtype)
    for _ in range(heron.steps):
        root = (x / root).add_(root).mul_(0.5)
    return torch.where(x > 0, root, x)


def ordered_lengths(vectors: Tensor) -> Tensor:
    """Return the l2 norm of each sample's vector, shape ``(batch,)``, in the type of the vectors.

    Squares are added half to half until one number is left; those of half precision are added in float32.

    Args:
        vectors: ``(batch, …)``, of any floating-point type.

    Cost: some 40 operations, and a copy of half of the vectors.
    """
    flat = (vectors if vectors.dtype in HERON else vectors.float()).flatten(1)
    width = flat.shape[1]
    half = (width + 1) // 2
    sums, rest = flat[:, :half] * flat[:, :half], flat[:, half:]
    sums[:, : width - half] += rest * rest
    while half > 1:
        width, half = half, (half + 1) // 2
        sums[:, : width - half] += sums[:, half:width]
    return square_root(sums[:, :half].sum(1)).to(vectors.dtype)
