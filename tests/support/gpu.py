"""The device of the tests for a GPU: a CUDA device, or a CPU that emulates one so that the tests themselves are tested.

With the environment variable ``EMULATED_GPU`` and without a CUDA device they run on the CPU, in small: the kernels in
Triton's interpreter, and without what only a device can show (waits, memory, rounding of its own kernels).
"""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EMULATED = not ON_GPU and bool(os.environ.get("EMULATED_GPU"))
if ON_GPU:  # before cuBLAS begins: trainings are compared bit by bit
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU and not EMULATED, reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of Lightning and of torch about this machine
]
"""Marks of a module of tests for a GPU."""


def emulate(patch: pytest.MonkeyPatch, interpreted: bool) -> None:
    """Let a CPU stand in for a CUDA device.

    Args:
        patch: undoes it.
        interpreted: whether Triton's interpreter reads the weights, instead of numba's loops.
    """
    for name in ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode", "empty_cache"):
        patch.setattr(torch.cuda, name, lambda *args: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        patch.setattr(torch.cuda, name, lambda *args: 0)
    if interpreted:
        from lightning_normgeo.geometry.products import compiled, one_pass

        patch.setitem(compiled._LOOPS, "cpu", "triton_launches")
        patch.setitem(compiled._DTYPES, "cpu", compiled._DTYPES["cuda"])
        patch.setattr(compiled, "_WORTHWHILE", 0)
        patch.setattr(one_pass, "_is_wide", lambda one: True)  # numbers of a device are of its own dtype
