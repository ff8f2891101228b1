"""Constants are read in a model's forward pass alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_normgeo.normalization.autograd import zero_constants
from lightning_normgeo.normalization.autograd.zero_constants import ZeroConstants


def test_a_constant_of_zeros_is_recorded() -> None:
    x = torch.ones(2, requires_grad=True)
    with ZeroConstants() as constants:
        y = torch.cat([x, torch.zeros(1)])
        z = torch.cat([x, torch.ones(1)])
    assert y.grad_fn in constants.nodes
    assert z.grad_fn not in constants.nodes


def test_nothing_is_read_where_nothing_is_recorded() -> None:
    """An optimizer's step, and what is measured around it, has no nodes; reading there would wait for a GPU."""

    def update(x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.cat([x[:1], x[1:]]), 0.0)

    with FakeTensorMode(), torch.no_grad(), ZeroConstants():  # values of fake tensors cannot be read
        assert update(torch.ones(2)).shape == (2,)


def test_nothing_is_read_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """To wait for a value would break the capture, in the user's forward pass."""
    monkeypatch.setattr(zero_constants, "is_captured", lambda: True)
    with FakeTensorMode():
        x, y = torch.ones(2, device="cuda", requires_grad=True), torch.zeros(1, device="cuda")
        with ZeroConstants() as constants:
            joined = torch.cat([x, y])
    assert joined.grad_fn not in constants.nodes
