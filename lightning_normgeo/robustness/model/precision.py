"""Precision of a model's forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.utilities.tf32 import uses_tf32

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
    if narrowest == torch.float32 and images.device.type == "cuda" and uses_tf32():
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
