"""The precision that a model computes in, and full float32 where checks need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
HALF = (torch.bfloat16, torch.float16)


def precision_of(images: Tensor, module: nn.Module | None) -> str:
    """The precision of a forward pass: ``fp64``, ``fp32``, ``tf32``, ``bf16`` or ``fp16``.

    The narrowest of images and parameters counts. On a CUDA device torch computes convolutions of float32 with ten bits
    of mantissa (TF32) unless told not to; that is said, because it moves logits by some 1e-4.
    """
    parameters = (
        [p.dtype for p in module.parameters() if p.is_floating_point()] if isinstance(module, nn.Module) else []
    )
    dtypes = [images.dtype, *parameters]
    narrowest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    if narrowest == torch.float32 and images.device.type == "cuda" and _uses_tf32():
        return "tf32"
    return _NAMES.get(narrowest, str(narrowest).removeprefix("torch."))


def _uses_tf32() -> bool:
    return any(getattr(holder, name) in (True, "tf32") for holder, name, _ in _switches())


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 with all its bits meanwhile: TF32 is off, as rounding of 1e-4 is no difference of functions."""
    with ExitStack() as stack:
        for holder, name, off in _switches():
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, off)
        yield


def _switches() -> list[tuple[Any, str, Any]]:
    """Whoever decides about TF32, the name of its setting, and the value without."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # reading the older settings raises where the newer ones differ
        holders = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
        return [(holder, "fp32_precision", "ieee") for holder in holders]
    return [(backends.cudnn, "allow_tf32", False), (backends.cuda.matmul, "allow_tf32", False)]
