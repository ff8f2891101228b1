"""TF32 is off for as long as it is asked for, and all settings of torch agree then and afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_normgeo import batch_geometry
from lightning_normgeo.utilities.tf32 import full_float32, uses_tf32
from support.tf32 import convolve_in_tf32

backends: Any = torch.backends


def settings() -> list[Any]:
    operators = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul
    return [
        *(one.fp32_precision for one in operators),
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
    ]


@pytest.fixture(params=itertools.product([True, False], ["highest", "high", "medium"]), ids=str)
def before(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    old = backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), backends.mkldnn.matmul.fp32_precision
    backends.cudnn.allow_tf32 = request.param[0]
    torch.set_float32_matmul_precision(request.param[1])
    yield settings()
    backends.cudnn.allow_tf32 = old[0]
    torch.set_float32_matmul_precision(old[1])
    backends.mkldnn.matmul.fp32_precision = old[2]


def test_settings_agree_inside_and_are_restored(before: list[Any]) -> None:
    with full_float32():
        assert settings() == ["ieee"] * 4 + [False, False, "highest"]  # torch raises where two of them disagree
        assert not uses_tf32()
        with backends.cudnn.flags(enabled=False), full_float32():
            pass
    assert settings() == before
    assert uses_tf32() == ("tf32" in before[:3])
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert settings() == before


def test_operators_that_were_set_apart_stay_so() -> None:
    old = backends.cudnn.conv.fp32_precision
    backends.cudnn.conv.fp32_precision = "ieee"  # torch raises now where the common setting is read
    try:
        with full_float32():
            assert not uses_tf32()
        assert (backends.cudnn.conv.fp32_precision, backends.cudnn.rnn.fp32_precision) == ("ieee", "tf32")
        with pytest.raises(RuntimeError):
            _ = backends.cudnn.allow_tf32
    finally:
        backends.cudnn.conv.fp32_precision = old


def test_ranks_are_found_where_convolutions_are_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with the kernel of Σ_X are compared with the rounding of float32."""
    torch.manual_seed(0)
    x = torch.einsum("oc,bchw->bohw", torch.randn(8, 4), torch.randn(64, 4, 12, 12))  # half of the rank
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 3, 3, bias=False))
    expected = batch_geometry(net, x, exact_up_to=80)["0"].inputs
    convolve_in_tf32(monkeypatch)
    found = batch_geometry(net, x, exact_up_to=80)["0"].inputs
    assert not found.exact
    assert found.rank.tolist() == expected.rank.tolist() == [36.0]
    torch.testing.assert_close(found.spectrum.trace, expected.spectrum.trace, rtol=1e-7, atol=0.0)
    assert uses_tf32()
