"""Precision of a model's forward pass, and a context with full float32 for checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import UnsuitableError

_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
HALF = (torch.bfloat16, torch.float16)
VERIFIED = "bf16-verified"
"""Attacks search in bf16, and all decisions are made in the model's own precision."""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, VERIFIED: torch.bfloat16}
"""Values of the setting ``autocast``, with the dtype that it computes in."""


def precision_name(autocast: str | None, own: str) -> str:
    """Return the name of an evaluation's precision, e.g. ``fp32``, ``bf16``, or ``bf16-verified in tf32``.

    Args:
        autocast: a name of :data:`AUTOCAST`; None for none.
        own: the model's own precision, in which decisions are verified; it is left out if it is ``fp32``.
    """
    return f"{autocast} in {own}" if autocast == VERIFIED and own != "fp32" else autocast or own


def precision_of(images: Tensor, module: nn.Module | None) -> str:
    """Return the precision of a forward pass: ``fp64``, ``fp32``, ``tf32``, ``bf16`` or ``fp16``.

    It is the narrowest precision of images and parameters. On a CUDA device torch by default computes convolutions of
    float32 in TF32, with ten bits of mantissa, which changes logits by about 1e-4; then ``tf32`` is returned.
    """
    dtypes = [images.dtype]
    if isinstance(module, nn.Module):
        dtypes += [p.dtype for p in module.parameters() if p.is_floating_point()]
    narrowest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    if narrowest == torch.float32 and images.device.type == "cuda" and _uses_tf32():
        return "tf32"
    return _NAMES.get(narrowest, str(narrowest).removeprefix("torch."))


def check_verifiable(precision: str, scores: Tensor | None = None) -> None:
    """Refuse ``autocast="bf16-verified"`` for a model whose own precision is not wider than bfloat16.

    Args:
        precision: name of the model's precision, as :func:`precision_of` returns it.
        scores: some of its logits. Default: they are not known yet.

    Raises:
        UnsuitableError: with the remedy.
    """
    half = {_NAMES[dtype] for dtype in HALF}
    found = precision if precision in half else "" if scores is None else _NAMES.get(scores.dtype, "")
    if found in half:
        raise UnsuitableError(
            f"autocast={VERIFIED!r} verifies decisions in the model's own precision, and this model computes in "
            f"{found}. Convert the model and its images to float32 (model.float(), or Trainer(precision='32-true')), "
            "or leave autocast out."
        )


def _uses_tf32() -> bool:
    return any(getattr(holder, name) in (True, "tf32") for holder, name, _ in _switches())


@contextmanager
def full_float32() -> Iterator[None]:
    """Context without TF32, whose rounding of about 1e-4 would hide whether two functions are the same."""
    with ExitStack() as stack:
        for holder, name, off in _switches():
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, off)
        yield


def _switches() -> list[tuple[Any, str, Any]]:
    """Return the settings of torch for TF32: the object, the name of its attribute, and the value that disables it."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # newer torch: reading allow_tf32 raises if the new settings are mixed
        holders = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
        return [(holder, "fp32_precision", "ieee") for holder in holders]
    return [(backends.cudnn, "allow_tf32", False), (backends.cuda.matmul, "allow_tf32", False)]
