"""Temporary parameter swaps of a model, and the change of its logits by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ParameterSlot = tuple[dict[str, Any], str, Any]
"""A dictionary of a module (parameters, buffers or attributes), a key of it, and the temporary value for this key."""


@contextmanager
def swapped_parameters(places: Iterable[ParameterSlot]) -> Iterator[None]:
    """Context with temporary values in their slots; afterwards, even after an error, the very same objects are back."""
    with ExitStack() as stack:
        for table, key, value in places:
            if key in table:
                stack.callback(table.__setitem__, key, table[key])
            else:
                stack.callback(table.pop, key)
            table[key] = value
        yield


@torch.no_grad()
def logit_change(
    active: AbstractContextManager[None],
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    arranged: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Return the largest change of a logit inside a context, relative to the largest logit.

    Images without a largest logit that is finite, such as those with NaN in a pixel, show no change and are left out;
    NaN is returned if there are no others. A logit that is finite outside the context only has changed infinitely, and
    so has one of −∞, of a class that the model masks, that becomes another.

    Args:
        active: the context, which swaps parameters.
        logits: maps images to the model's logits.
        images: the images to compare on.
        arranged: converts the images for the model inside the context. Default: no conversion.

    Cost: two forward passes.
    """
    expected = logits(images)
    with active:
        found = logits(images if arranged is None else arranged(images))
    known = expected.reshape(len(expected), -1).amax(1).isfinite()
    if not known.any():
        return math.nan
    found, expected = found[known], expected[known]
    change = (found - expected).masked_fill(found == expected, 0.0).abs().nan_to_num(math.inf, math.inf)
    return float(change.amax() / expected[expected.isfinite()].abs().amax().clamp_min(1e-30))


class LogitsModule(nn.Module):
    """A module whose forward is a given function of a model, which it contains as ``module``.

    Error messages name the model, which is all that the user knows of.
    """

    def __init__(self, module: nn.Module, logits: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.module = module
        self._logits = (logits,)  # in a tuple, since a function that is a module would be registered as a child

    def forward(self, images: Tensor) -> Any:
        """Return the logits, or the output that holds them."""
        return self._logits[0](images)

    def _get_name(self) -> str:
        return type(self.module).__name__

    @staticmethod
    def own_name(name: str) -> str:
        """Return the name that a parameter or layer of this module has in the model itself."""
        return name.removeprefix("module.")
