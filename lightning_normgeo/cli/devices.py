"""Check of the number of processes against the machine."""

from __future__ import annotations

import os

from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import CPUAccelerator

from lightning_normgeo.errors import warn_once


def warn_of_crowd(trainer: Trainer) -> None:
    """Warn before a training on CPUs starts more processes than there are cores.

    Lightning allows any number. Each process imports torch anew and waits for all others, so that many of them take
    minutes or all memory before the first step, without a word.

    Args:
        trainer: Trainer that has not started its processes yet.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
        warn_once(
            f"trainer.devices={trainer.num_devices} starts {trainer.num_devices} processes on {cores} CPU cores. Each "
            f"loads torch and waits for the others, which can take minutes. Use --trainer.devices {cores} or fewer."
        )
