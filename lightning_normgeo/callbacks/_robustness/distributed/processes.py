"""Exchange of results between the processes of a Trainer, however long one of them takes."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_normgeo.errors import warn_once

_T = TypeVar("_T")
_PATIENCE = timedelta(days=30)
"""How long a process waits for another one that lives. One that has died is noticed at once, by its connection."""
_QUIET = 60.0
"""Seconds of waiting after which it is said once."""
_group: tuple[Any, Any] | None = None
"""The Trainer's process group and the group for exchanges that was made for it. It is kept until the Trainer's is
destroyed: a group that one process destroys may fail on another one that still reads from it."""


class Processes:
    """The processes of a Trainer, which wait for each other as long as one of them needs.

    Each process attacks its own samples, and attacks that end early on one may go on for hours on another. Collectives
    of the Trainer's process group fail after its timeout, with NCCL after 10 minutes. Exchanges use a gloo group of
    their own, which waits for a process as long as it lives.

    Every process has to construct it, and to call its methods in the same order.

    Args:
        count: number of processes; with one, everything is answered locally.

    Cost: once per process group, a connection between each two processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._group = _group_for_exchanges(count) if count > 1 else None

    def gathered(self, mine: _T) -> list[_T]:
        """Return the objects of all processes, in the order of their ranks."""
        if self.count == 1:
            return [mine]
        self._wait()
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, mine, group=self._group)
        return found

    def _wait(self) -> None:
        """Wait for all processes. Python runs meanwhile, so that the keyboard can interrupt it."""
        if self._group is None:
            return
        work = torch.distributed.barrier(group=self._group, async_op=True)
        start, pause, is_said = time.monotonic(), 1e-4, False
        while not work.is_completed():
            time.sleep(pause)
            pause = min(1.5 * pause, 0.5)
            if not is_said and time.monotonic() - start > _QUIET:
                is_said = True
                rank_zero_info("The first process has evaluated its samples and waits for those that have not.")
        work.wait()  # raises the error of a connection that is lost


def _group_for_exchanges(count: int) -> Any:
    """Return the group for exchanges of the Trainer's process group; None if the latter has to be used itself."""
    global _group
    if not torch.distributed.is_initialized():
        return None
    world = torch.distributed.group.WORLD
    if _group is None or _group[0] is not world:
        _group = world, _new_group(count)
    return _group[1]


def _new_group(count: int) -> Any:
    """Return a new gloo group of all processes; None, on all of them, if one of them cannot have it."""
    group, reason = None, ""
    try:
        group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    except Exception as error:  # gloo finds no network interface by which it reaches the others
        reason = f"{type(error).__name__}: {error}"
    reasons: list[Any] = [None] * count
    torch.distributed.all_gather_object(reasons, reason)
    reason = next(filter(None, reasons), "")
    if reason:
        warn_once(
            "Processes wait for each other no longer than the Trainer's own timeout, since there is no gloo group for "
            f"longer waits ({reason}). If their samples take very different times, give the strategy a longer timeout."
        )
    return None if reason else group
