"""Calls of a model with copies of the images, which it may overwrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

_T = TypeVar("_T")


def on_copies(logits: Callable[[Tensor], _T]) -> Callable[[Tensor], _T]:
    """Return a function that calls a model with a copy of the images, as a model may normalize its input in place.

    An attack and later passes need the images themselves. Besides, the copy is part of the graph: autograd forbids
    writing to the images that an attack takes the gradient of. A function from here is returned as it is.

    Args:
        logits: maps images to the model's output.

    Cost: one copy of the images in each pass.
    """
    if getattr(logits, "copies_images", False):
        return logits

    def on_copy(images: Tensor) -> _T:
        return logits(images.clone())

    on_copy.copies_images = True  # type: ignore[attr-defined]
    return on_copy
