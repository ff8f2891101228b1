"""With ε charges are exactly the sum of the parts of all normalizations that remove a scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.symmetries import epsilon_charges, scale_symmetries

EPS = 0.05


class Block(nn.Module):
    """A pre-norm block with attention, in front of a last normalization."""

    def __init__(self, norm: Callable[[], nn.Module], width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.ins, self.outs = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.outs(self.ins(self.norms[1](x)).relu())
        logits: Tensor = self.head(self.norms[2](x).mean(1))
        return logits


class Twice(nn.Module):
    """A normalization that is called twice, on the output of one layer and of another one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.second(self.norm(self.first(x)).relu())).tanh()
        return y


def convolutions(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), norm(8), nn.Flatten(), nn.Linear(128, 3)
    )


def with_large_epsilon(network: nn.Module) -> nn.Module:
    for layer in network.modules():
        if isinstance(getattr(layer, "eps", None), float):
            layer.eps = EPS  # type: ignore[assignment]
    return network


TOKENS, IMAGES = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(4, 3, 8, 8, dtype=torch.float64)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "layer normalization": (lambda: Block(lambda: nn.LayerNorm(8, eps=EPS)), TOKENS),
    "RMS normalization": (lambda: Block(lambda: nn.RMSNorm(8, eps=EPS)), TOKENS),
    "batch normalization": (lambda: convolutions(lambda width: nn.BatchNorm2d(width, eps=EPS)), IMAGES),
    "group normalization": (lambda: convolutions(lambda width: nn.GroupNorm(4, width, eps=EPS)), IMAGES),
    "called twice": (Twice, TOKENS),
    "resnet18": (
        lambda: with_large_epsilon(torchvision.models.resnet18()),
        torch.randn(4, 3, 64, 64, dtype=torch.float64),
    ),
    "vit": (
        lambda: with_large_epsilon(
            torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
        ),
        torch.randn(4, 3, 32, 32, dtype=torch.float64),
    ),
}


def loss(output: Tensor) -> Tensor:
    readout = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
    return (readout * F.softplus(output)).sum()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_charge_is_the_part_of_epsilon(name: str) -> None:
    torch.manual_seed(0)
    build, batch = NETWORKS[name]
    network = build().double().train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    symmetries, parts = epsilon_charges(network, batch, loss)
    loss(network(batch)).backward()
    charges = symmetries.charges(dict(network.named_parameters()))
    assert np.abs(charges).max() > 1e-3
    assert np.abs(charges - parts).max() < 1e-12 * max(1.0, np.abs(charges).max())
    assert len(symmetries) == len(scale_symmetries(network, batch, loss))


def test_a_normalization_that_is_written_out_has_no_part() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
            self.norm = nn.LayerNorm(5, eps=EPS)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-4)
            z: Tensor = self.norm(self.second(y.tanh()))
            return z

    torch.manual_seed(0)
    network = Own().double()
    symmetries, parts = epsilon_charges(network, TOKENS, loss)
    loss(network(TOKENS)).backward()
    charges = symmetries.charges(dict(network.named_parameters()))
    known = ~np.isnan(parts)
    assert 0 < known.sum() < len(parts)
    assert np.abs(charges[known] - parts[known]).max() < 1e-13
    unknown = {
        member.slices.parameter for f in symmetries.families for member in f.members if not known[f.generators].all()
    }
    assert "first.weight" in unknown
    assert "second.weight" not in unknown


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    network: Any = NETWORKS["batch normalization"][0]().double().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    epsilon_charges(network, IMAGES, loss)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_compiled_models_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot look into a compiled model\. Give it the model itself"):
        epsilon_charges(torch.compile(Twice().double()), TOKENS, loss)
