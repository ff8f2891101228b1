"""Queue that joins samples to larger batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Samples = tuple[Tensor, Tensor, Tensor]
"""Images, labels and the samples' numbers."""


class BatchQueue:
    """Joins the samples of a loader's batches to larger batches, separately for each shape of images."""

    def __init__(self) -> None:
        self._waiting: dict[torch.Size, list[Samples]] = {}

    def add(self, samples: Samples, size: int) -> Iterator[Samples]:
        """Add samples with images of one shape, and yield full batches of ``size`` samples."""
        waiting = self._waiting.setdefault(samples[0].shape[1:], [])
        waiting.append(samples)
        while sum(len(labels) for _, labels, _ in waiting) >= size:
            images, labels, numbers = map(torch.cat, zip(*waiting, strict=True))
            waiting[:] = [(images[size:], labels[size:], numbers[size:])]
            yield images[:size], labels[:size], numbers[:size]

    def rest(self) -> Iterator[Samples]:
        """Yield the queued samples, one batch per shape of images, and empty the queue."""
        left, self._waiting = self._waiting, {}
        for waiting in left.values():
            images, labels, numbers = map(torch.cat, zip(*waiting, strict=True))
            if len(labels):
                yield images, labels, numbers
