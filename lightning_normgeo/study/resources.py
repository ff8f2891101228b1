"""CPU threads and GPUs of each concurrent run."""

from __future__ import annotations

import os


def resource_share(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment variables that give one of several concurrent runs its share of the cores and GPUs.

    Args:
        slot: Number of the run among the concurrent ones, in [0, jobs).
        jobs: Number of concurrent runs, at least 1.

    Returns:
        ``OMP_NUM_THREADS``, which stays unchanged if it is set, and ``CUDA_VISIBLE_DEVICES`` if there are GPUs; several
        runs share a GPU if there are more runs than GPUs. Nothing for a single run, which has the whole machine.
    """
    if jobs == 1:
        return {}
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // jobs))
    share = {"OMP_NUM_THREADS": threads}
    devices = _devices()
    if devices:
        own = devices[slot::jobs] or [devices[slot % len(devices)]]
        share["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return share


def _cores() -> int:
    """Return the number of cores that this process may use; a batch system may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[str]:
    """Return the GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # takes seconds, which the command's help need not wait for

    return [str(i) for i in range(torch.cuda.device_count())]
