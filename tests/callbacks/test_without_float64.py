"""Devices without float64, such as Apple's GPUs: everything has the CPU's numbers, on an emulated device.

The emulation computes with the CPU's kernels, so that a training has the very same weights; what is measured of them
has to be the same to the last digits of float64.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_normgeo import scale_symmetries
from support.coarse_measurements import MEASUREMENTS
from support.fork_server import lightning_server
from support.isolation import SUPPORT

ROUNDING = {
    "robustness": 1e-6,  # losses of a float32 model, from other kernels
    "reductions": 1e-3,  # functions of tensors that stay on the device, in float32
}
"""Largest relative difference of numbers that are not taken in float64 on the CPU."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    file: Path = tmp_path_factory.mktemp("coarse") / "found.json"
    done = lightning_server().run(SUPPORT / "coarse_measurements.py", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name in MEASUREMENTS if name != "console"])
def test_the_numbers_are_those_of_a_cpu(found: dict[str, dict[str, Any]], name: str) -> None:
    cpu, device = found[name]["cpu"], found[name]["device"]
    assert not cpu["error"]
    assert not device["error"]
    assert device["warned"] == cpu["warned"]
    assert len(json.dumps(cpu["numbers"])) > 300, "it measured next to nothing"
    assert not differences(device["numbers"], cpu["numbers"], ROUNDING.get(name, 1e-12))


def test_observing_changes_nothing(found: dict[str, dict[str, Any]]) -> None:
    plain = found["nothing observed"]["device"]["numbers"]["weights"]
    assert found["monitors, SGD"]["device"]["numbers"]["weights"] == plain


def test_the_line_at_the_start_names_the_copy(found: dict[str, dict[str, Any]]) -> None:
    (first, last), (cpu_first, cpu_last) = (found["console"][place]["numbers"] for place in ("device", "cpu"))
    assert first == f"{cpu_first} coarse has no float64: what is measured is copied to the CPU first."
    assert last == cpu_last


def differences(found: Any, expected: Any, rel: float, path: str = "") -> list[str]:
    """Return the places at which two documents differ."""
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return [one for key in expected for one in differences(found[key], expected[key], rel, f"{path}/{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [one for k, pair in pairs for one in differences(*pair, rel, f"{path}[{k}]")]
    if isinstance(expected, float) and isinstance(found, float):
        alike = math.isclose(found, expected, rel_tol=rel) or (math.isnan(found) and math.isnan(expected))
        return [] if alike else [f"{path}: {found} for {expected}"]
    return [] if found == expected else [f"{path}: {found} for {expected}"]


# --- autograd nodes of Metal ------------------------------------------------------------------------------------------


class MaxPool2D(torch.autograd.Function):
    """A stand-in for the pooling of Metal, which is one node of its own in the autograd graph."""

    __module__ = "torch.stand_in"  # a name that counts as torch's own

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return F.max_pool2d(x, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.max_pool2d(x, 2), x, gradient)


class Pooled(nn.Sequential):
    """Convolutions with a pooling between them."""

    def __init__(self, pooling: Any) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 2))
        self.pooling = pooling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self.pooling(self[0](x).relu()))


def test_the_pooling_of_metal_is_followed() -> None:
    x = torch.randn(2, 3, 8, 8)
    expected, symmetries = (scale_symmetries(Pooled(pooling), x) for pooling in (nn.MaxPool2d(2), MaxPool2D.apply))
    assert [str(family) for family in symmetries.families] == [str(family) for family in expected.families]
    assert len(expected.families) == 1
