"""What each of several runs at a time gets of this machine."""

from __future__ import annotations

import os


def resource_share(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment that gives one of several runs its share of the cores and GPUs.

    Args:
        slot: which of them it is, from 0.
        jobs: how many there are at a time. With more runs than GPUs, several have one in common.
    """
    if jobs == 1:
        return {}
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // jobs))
    devices = _devices()
    mine = devices[slot::jobs] or devices[slot % len(devices) :][:1] if devices else []
    return {"OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})}


def _cores() -> int:
    """Return the cores that this process may use, which a batch system may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # takes seconds, which the help of the command does without

    return [str(i) for i in range(torch.cuda.device_count())]
