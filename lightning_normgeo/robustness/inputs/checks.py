"""Checks of images and labels before an evaluation uses them."""

from __future__ import annotations

from torch import Tensor

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.inputs.advice import override
from lightning_normgeo.robustness.inputs.input_space import InputSpace, Space
from lightning_normgeo.robustness.inputs.pixel_range import check_range

_UNLABELED = (
    "A label below 0, as the -100 that losses ignore, is no class. Leave samples without a class out of the data set, "
    "as with torch.utils.data.Subset."
)
_MORE_CLASSES = (
    "Give a model with an output for each class of the data, or data with the model's classes only, counted from 0."
)


def check_images(images: Tensor, inputs: InputSpace, space: Space = "pixel") -> None:
    """Check that images are in floating point and, unless the space is ``input``, that they are pixels in [0, 1].

    Raises:
        UnsuitableError: if they are not.
    """
    if not images.is_floating_point():
        raise UnsuitableError(f"Images have dtype {images.dtype}; expected floating point in [0, 1].")
    if space != "input":
        check_range(images, inputs)


def check_labels(labels: Tensor, scores: Tensor) -> None:
    """Check that labels are class indices that fit the model's logits.

    Args:
        labels: ``(batch,)``, at least one.
        scores: the model's output for the same samples, of which only the shape is used.

    Raises:
        UnsuitableError: if the shapes do not fit, or a label is not a class of the model.
    """
    if not isinstance(scores, Tensor):
        raise UnsuitableError(
            f"Expected logits (batch, classes), got {type(scores).__name__}. {override('logits')} to return the "
            "logits of a model with several outputs."
        )
    if scores.ndim != 2 or labels.ndim != 1 or scores.shape[0] != labels.shape[0]:
        raise UnsuitableError(
            f"Expected logits (batch, classes) and labels (batch,), got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}. {override('logits', 'unpack')} for other models."
        )
    low, high = labels.amin().item(), labels.amax().item()
    if low < 0 or high >= scores.shape[1]:
        raise UnsuitableError(
            f"Labels span {low}…{high}, but the model has {scores.shape[1]} classes (0…{scores.shape[1] - 1}). "
            + (_UNLABELED if low < 0 else _MORE_CLASSES)
        )
