"""Versions and hardware of a run, read without importing any further package."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from lightning_normgeo._version import __version__

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "lightning", "torchmetrics", "wandb", "torchattacks", "numba")


def describe_environment() -> dict[str, str]:
    """Return versions and hardware by name.

    ``threads``, the number of threads that torch computes with, and GPUs are included only if torch has been imported.
    """
    found = {
        "lightning-normgeo": __version__,
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = str(torch.get_num_threads())
        if torch.cuda.is_available():
            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            found["gpu"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
            found["cuda"] = str(torch.version.cuda)
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the processor's name; on Linux only a file has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
