"""What stands in for parts of a model for a while, and whether the model computes the same with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ParameterSlot = tuple[dict[str, Any], str, Any]
"""A table of a module (its parameters, its buffers, its attributes), a key, and what goes there meanwhile."""


@contextmanager
def swapped_parameters(places: Iterable[ParameterSlot]) -> Iterator[None]:
    """Put stand-ins into their places; afterwards everything is as it was, by identity, also after an error."""
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
    """Return the largest change of a logit while ``active`` lasts, relative to the largest logit.

    Args:
        active: what stands in meanwhile.
        logits: the model.
        images: a few.
        arranged: what images go through meanwhile, if anything.
    """
    expected = logits(images)
    with active:
        found = logits(images if arranged is None else arranged(images))
    return float((found - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30))


class LogitsModule(nn.Module):
    """A model that is called in somebody's own way."""

    def __init__(self, module: nn.Module, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._logits = (logits,)  # a module would be registered

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self._logits[0](images)

    @staticmethod
    def own_name(name: str) -> str:
        """Return a name that the model itself has for a part."""
        return name.removeprefix("module.")
