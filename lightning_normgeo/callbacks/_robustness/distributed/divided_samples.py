"""Division of samples between processes whose loaders all yield the same ones, as without a distributed sampler."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_normgeo.callbacks._robustness.distributed.evaluation_processes import EvaluationProcesses
from lightning_normgeo.robustness.loader_evaluation import LoaderEvaluation


class DividedSamples:
    """Divides the samples of loaders between processes, if all processes get the same ones.

    Without a distributed sampler each process gets the whole data set, and would evaluate all of it. Processes whose
    loaders go through a data set in order, over as many samples, and whose first batches are equal bit for bit, take
    the samples of their own: those whose key is their rank modulo the number of processes. Nothing rests on this
    evidence but time: what no process has evaluated at the end is evaluated then, see :meth:`left`.

    Args:
        processes: the processes.
        evaluations: the evaluation of each loader.
        rank: the rank of this process.
    """

    def __init__(self, processes: EvaluationProcesses, evaluations: Sequence[LoaderEvaluation], rank: int) -> None:
        self._processes, self._evaluations, self._rank = processes, evaluations, rank
        self._is_agreed = processes.count == 1

    def agree(self, first: Tensor | None) -> None:
        """Divide the samples if all processes get the same; every process calls it with its first batch, or at the end.

        Args:
            first: the images of the first batch; None without one.
        """
        if self._is_agreed:
            return
        self._is_agreed = True
        orders = [evaluation.seen.order.positions for evaluation in self._evaluations]
        lengths = [len(order) if isinstance(order, range) else None for order in orders]
        found = self._processes.gathered((lengths, None if first is None else _digest(first)))
        if first is None or any(one != found[0] for one in found):
            return
        for evaluation, length in zip(self._evaluations, lengths, strict=True):
            if length is not None:
                evaluation.seen.share = self._rank, self._processes.count

    def left(self) -> dict[int, list[int]]:
        """Return the positions of samples that were left to other processes, which did not get them, by loader."""
        seen = [evaluation.seen for evaluation in self._evaluations]
        if all(one.share is None for one in seen):
            return {}
        shares = self._processes.gathered([one.places.keys() - one.left for one in seen])
        taken = [set[int]().union(*parts) for parts in zip(*shares, strict=True)]
        return {
            number: sorted(one.places[key][0] for key in one.left - taken[number]) for number, one in enumerate(seen)
        }


def _digest(images: Tensor) -> str:
    content = images.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=16).hexdigest()
