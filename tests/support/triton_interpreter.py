"""The GPU kernels run by Triton's interpreter, on tensors of the CPU: right or wrong as on a GPU, and slow."""

from __future__ import annotations

from types import ModuleType

import pytest


def interpreted() -> ModuleType:
    """Return the launches of the kernels if the interpreter runs them; skip the test where it does not."""
    launches = pytest.importorskip("lightning_normgeo.geometry.products.triton_launches", exc_type=ImportError)
    if "Interpreted" not in type(launches.kernels.weight_kernel).__name__:
        pytest.skip("the kernels are compiled for a GPU")
    return launches
