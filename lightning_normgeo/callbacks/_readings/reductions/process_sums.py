"""Averages over the processes of a data-parallel training, if monitors run in all of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from lightning_normgeo.callbacks._readings.epsilon_part import GammaSums

_fits = itertools.count()


class ProcessSums:
    """Averages over all processes, computed only if monitors run in all of them: otherwise a collective would hang.

    Before its first batch, each process writes into the store of the process group what it observes; this does not
    wait for other processes. By the first measured step all processes have taken part in a backward pass, so that the
    store is complete.

    Args:
        trainer: the Trainer, before its first batch.
    """

    def __init__(self, trainer: Any) -> None:
        self.processes: int = trainer.world_size
        self._rank: int = trainer.global_rank
        self._all: bool | None = False
        self._keys: list[str] = []
        self._store: Any = None

    def declare(self, what: object) -> None:
        """Tell the other processes what this one observes; collectives are used only if all observe the same.

        Args:
            what: a description whose text is equal in all processes that observe the same, such as the cadences of all
                monitors.
        """
        if self.processes > 1 and torch.distributed.is_initialized():
            fit = next(_fits)
            self._keys = [f"lightning_normgeo/{fit}/{rank}/{what}" for rank in range(self.processes)]
            self._store = torch.distributed.distributed_c10d._get_default_store()
            self._store.set(self._keys[self._rank], "observed")
            self._all = None

    @property
    def everyone_observes(self) -> bool:
        """Whether all processes observe the same; to be read no earlier than in a measured step."""
        if self._all is None:
            self._all = bool(self._store.check(self._keys))
        return self._all

    def averaged(self, sums: Mapping[str, GammaSums]) -> dict[str, GammaSums] | None:
        """Return the means over processes, as data-parallel training averages gradients; None if not all observe.

        Cost: one collective, whose size depends on the model alone.
        """
        if not self.everyone_observes:
            return None
        flat = torch.cat([part for one in sums.values() for part in one])
        torch.distributed.all_reduce(flat)
        parts = iter(torch.split(flat / self.processes, [p.numel() for one in sums.values() for p in one]))
        return {name: GammaSums(next(parts), next(parts)) for name in sums}
