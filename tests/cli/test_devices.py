"""The number of processes on CPUs: one warning where they are more than the cores, and none otherwise."""

from __future__ import annotations

import os
import warnings

import pytest
from pytorch_lightning import Trainer

from lightning_normgeo.cli.devices import warn_of_crowd
from lightning_normgeo.errors import MeasurementWarning

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_cpu(devices: int) -> Trainer:
    return Trainer(accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False)


def test_more_processes_than_cores_are_warned_of() -> None:
    with pytest.warns(MeasurementWarning, match=rf"devices={CORES + 97} starts .* Use --trainer\.devices {CORES} or"):
        warn_of_crowd(on_cpu(CORES + 97))


def test_as_many_as_cores_are_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_crowd(on_cpu(CORES))
