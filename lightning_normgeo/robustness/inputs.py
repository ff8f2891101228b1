"""What the images of a project are: pixels, or normalized by the data pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lightning_normgeo.robustness.threat import InputSpace


def input_space(
    module: nn.Module | None,
    dataloader: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> InputSpace:
    """Return what the images of a loader are: as declared, or else as found.

    A module's attribute ``input_normalization`` with ``mean`` and ``std`` says that the model normalizes pixels; a
    torchvision ``Normalize`` among the transforms of the data set that the data pipeline does. The range of the images
    confirms it later.

    Args:
        module: the model.
        dataloader: yields the images.
        mean: as declared by the user, for images that the data pipeline normalizes.
        std: likewise.
    """
    if mean is not None or std is not None:
        return InputSpace(_numbers(mean), _numbers(std), normalized_data=True)
    inside = getattr(module, "input_normalization", None)
    if inside is not None:
        return InputSpace(_numbers(inside.mean), _numbers(inside.std), normalized_data=False)
    found = next(_normalizations(getattr(dataloader, "dataset", None)), None)
    if found is not None:
        return InputSpace(_numbers(found.mean), _numbers(found.std), normalized_data=True)
    return InputSpace(None, None, normalized_data=False)


def _normalizations(thing: Any, depth: int = 0) -> Iterator[Any]:
    """Yield what normalizes images, last first, in a data set or what it wraps."""
    if thing is None or depth > 8:
        return
    if type(thing).__name__ == "Normalize" and hasattr(thing, "mean") and hasattr(thing, "std"):
        yield thing
    inner = getattr(thing, "transforms", None)
    parts = list(inner) if isinstance(inner, (list, tuple, nn.Sequential)) else [] if inner is thing else [inner]
    for part in [*reversed(parts), getattr(thing, "transform", None), getattr(thing, "dataset", None)]:
        yield from _normalizations(part, depth + 1)


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(torch.as_tensor(values).flatten().tolist())
