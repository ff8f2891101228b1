"""Convolutions with the rounding of TF32 on a CPU, as cuDNN has it unless it is turned off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_normgeo.geometry.input_covariance import patch_map
from lightning_normgeo.utilities.tf32 import uses_tf32


def ten_bits(tensor: Tensor) -> Tensor:
    """Round to the mantissa of TF32."""
    bits = tensor.detach().contiguous().view(torch.int32)
    rounded = ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return tensor + (rounded - tensor).detach()


def convolve_in_tf32(patch: pytest.MonkeyPatch) -> None:
    """Round the factors of convolutions in two dimensions, and of their gradients, unless TF32 is turned off."""

    def rounding(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def rounded(*args: Any, **kwargs: Any) -> Tensor:
            return plain(*map(_rounded, args), **{name: _rounded(value) for name, value in kwargs.items()})

        return rounded

    pairs = [tuple(map(rounding, pair)) for pair in patch_map._CONVOLUTIONS]
    patch.setattr(patch_map, "_CONVOLUTIONS", tuple(pairs))
    patch.setattr(torch.nn.functional, "conv2d", rounding(torch.nn.functional.conv2d))


def _rounded(value: Any) -> Any:
    coarse = isinstance(value, Tensor) and value.dtype == torch.float32 and uses_tf32()
    return ten_bits(value) if coarse else value
