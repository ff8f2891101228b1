"""Class indices from labels of different forms, and class logits from model outputs of different forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.inputs.advice import override
from lightning_normgeo.robustness.inputs.batches import described

_LOGIT_NAMES = ("logits", "out", "output", "scores")


def class_indices(labels: Tensor) -> Tensor:
    """Return class indices ``(batch,)`` of dtype int64.

    Args:
        labels: whole numbers of any dtype, ``(batch,)`` or ``(batch, 1)``, or one-hot rows ``(batch, classes)``.

    Raises:
        UnsuitableError: for anything else: regression targets, soft labels, several classes per image, masks.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        ones, zeros = (labels == 1).sum(1), (labels == 0).sum(1)
        if not bool(((ones == 1) & (zeros == labels.shape[1] - 1)).all()):
            raise UnsuitableError(
                f"Labels {described(labels)} are not one-hot: several classes of one image, or soft labels, are not "
                f"evaluated. {override('unpack')} to return class indices."
            )
        return labels.to(torch.int64).argmax(1)
    if labels.ndim != 1:
        raise UnsuitableError(
            f"Labels {described(labels)} are not one class for each image. {override('unpack')} to return class "
            "indices."
        )
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):
        raise UnsuitableError(
            f"Labels {described(labels)} are not whole numbers, so this is no classification. {override('unpack')} to "
            "return class indices."
        )
    return labels.to(torch.int64)


def class_logits(output: Any, count: int | None = None) -> Tensor:
    """Return class logits ``(batch, classes)`` from the output of a model.

    The output may be a tensor, an object with an attribute or entry ``logits`` (or ``out``, ``output``, ``scores``), or
    a tuple with a single tensor. Dimensions of size one after the classes are dropped. A single logit z per image, as
    for ``BCEWithLogitsLoss``, becomes the logits (0, z) of two classes, whose cross entropy is the same.

    Args:
        output: the model's output.
        count: number of images. If it is one, a missing batch dimension, as after ``squeeze()``, is restored.

    Raises:
        UnsuitableError: for any other output.
    """
    scores = _scores(output)
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise UnsuitableError(
            f"Expected logits (batch, classes), got {described(output)}. {override('logits')} to return the logits "
            "of a model with several outputs."
        )
    if count == 1 and scores.ndim < 2:
        scores = scores.reshape(1, -1)
    if scores.ndim > 2 and scores[0, 0].numel() == 1:
        scores = scores.flatten(1)
    if scores.ndim == 1 or (scores.ndim == 2 and scores.shape[1] == 1):
        column = scores.flatten()
        return torch.stack([torch.zeros_like(column), column], 1)
    return scores


def _scores(output: Any) -> Any:
    """Return the tensor of logits in an output, or None if it is not clear."""
    if isinstance(output, Tensor):
        return output
    for name in _LOGIT_NAMES:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, (tuple, list)):
        tensors = [entry for entry in output if isinstance(entry, Tensor)]
        return tensors[0] if len(tensors) == 1 else None
    return None
