"""Weights that read a channel, found in networks of many kinds; scores that no rescaling of them changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_normgeo.channels import ChannelTable, channel_table
from lightning_normgeo.channels.readers import ABSORBED
from lightning_normgeo.symmetries import scale_symmetries, transform
from support.small_models import Net, PreActivation, worn
from support.tensors import draw


def conv(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)  # type: ignore[arg-type]


def chain(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return worn(nn.Sequential(*layers)).double()  # type: ignore[return-value]


def stream(seed: int = 0) -> nn.Module:
    """A stem and a block that write into one stream, which two layers read."""
    torch.manual_seed(seed)
    net = Net(
        lambda m, x: m.head(m.block(m.stem(x).relu()) + m.stem(x).relu()),
        stem=nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)),
        block=nn.Sequential(conv(4, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 4), nn.BatchNorm2d(4)),
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)),
    )
    return worn(net).double()


def images(count: int = 6, channels: int = 3) -> Tensor:
    return draw(count, channels, 6, 6, seed=5)


def norm_of(net: nn.Module, *columns: tuple[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """Return the root of the sum of squares of chosen columns of parameters, one row per channel."""
    parameters = dict(net.named_parameters())
    return torch.cat([pick(parameters[name].detach()) for name, pick in columns], 1).norm(dim=1)


def inputs(weight: Tensor) -> Tensor:
    return weight.movedim(1, 0).flatten(1)


CASES = {
    "chain": (
        chain(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), nn.BatchNorm2d(5), nn.LeakyReLU(), conv(5, 2)),
        {"1": (("3.weight", inputs),), "4": (("6.weight", inputs),)},
    ),
    "flattened": (
        chain(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 7)),
        {"1": (("5.weight", lambda w: w.view(7, 4, 9).movedim(1, 0).flatten(1)),)},
    ),
    "grouped": (
        chain(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6, groups=2)),
        {"1": (("3.weight", lambda w: w.view(2, 3, 2, 9).movedim(2, 1).flatten(0, 1).flatten(1)),)},
    ),
    "transposed": (
        chain(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3)),
        {"1": (("3.weight", lambda w: w.flatten(1)),)},
    ),
    "no activation": (
        chain(conv(3, 4), nn.BatchNorm2d(4), conv(4, 6)),
        {"1": (("2.weight", inputs),)},
    ),
    "pre-activation": (
        worn(nn.Sequential(PreActivation(3, 4), PreActivation(4, 4))).double(),
        {f"{k}.bn{n}": ((f"{k}.conv{n}.weight", inputs),) for k in (0, 1) for n in (1, 2)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_product_is_gamma_times_what_reads_the_channel(name: str) -> None:
    net, readers = CASES[name]
    table = channel_table(net, images())
    assert list(table.layers) == list(readers)
    for layer, columns in readers.items():
        found = table[layer]
        assert torch.allclose(found.product, found.gamma.abs() * norm_of(net, *columns), rtol=1e-12, atol=0)
        assert found.writers.tolist() == [1] * len(found)
        assert found.reason == ""


def test_a_channel_of_a_residual_stream_is_read_by_all_readers_of_the_stream() -> None:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: (lambda y: m.head(m.block(y) + y))(m.stem(x).relu()),
        stem=nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)),
        block=nn.Sequential(conv(4, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 4), nn.BatchNorm2d(4)),
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)),
    )
    net = worn(net).double()
    table = channel_table(net, images())
    reads = norm_of(net, ("block.0.weight", inputs), ("head.2.weight", inputs))
    for layer in ("stem.1", "block.4"):
        assert torch.allclose(table[layer].product, table[layer].gamma.abs() * reads, rtol=1e-12, atol=0)
        assert table[layer].writers.tolist() == [2] * 4
    assert table["block.1"].writers.tolist() == [1] * 5
    assert "residual stream of 2 layers" in str(table)
    energy = table["stem.1"].gamma.square() + table["block.4"].gamma.square()
    parts = [
        weight.detach().square().flatten(2).sum(2) for weight in (net.block[0].weight, net.head[2].weight[..., None])
    ]
    shares = torch.cat([part * energy / (part * energy).sum(1, keepdim=True) for part in parts]).mean(0)
    for layer in ("stem.1", "block.4"):
        expected = shares * table[layer].gamma.square() / energy
        assert torch.allclose(table[layer].share, expected, rtol=1e-12, atol=0)


def naive_shares(net: nn.Module, name: str, layer: str, channels: int) -> Tensor:
    """Shares from the effect of each channel alone: the squared weights of its path to each unit, times γ²."""
    gamma = net.get_submodule(layer).weight.detach()
    reader = net.get_submodule(name.removesuffix(".weight"))
    bare = copy.deepcopy(reader).requires_grad_(False)
    bare.bias = None
    impulse = torch.zeros(
        channels, channels, *([5, 5] if not isinstance(reader, nn.Linear) else []), dtype=torch.float64
    )
    for k in range(channels):
        impulse[(k, k, 2, 2) if impulse.ndim == 4 else (k, k)] = gamma[k]
    energy = bare(impulse).flatten(2).square().sum(2) if impulse.ndim == 4 else bare(impulse).square()
    parts = energy / energy.sum(0)  # (channels, units)
    return torch.stack([part[energy[k] > 0].mean() for k, part in enumerate(parts)])


@pytest.mark.parametrize("name", ["chain", "grouped", "transposed", "no activation", "pre-activation"])
def test_shares_are_those_of_impulses_through_the_reader(name: str) -> None:
    net, readers = CASES[name]
    table = channel_table(net, images())
    for layer, ((weight, _),) in readers.items():
        expected = naive_shares(net, weight, layer, len(table[layer]))
        assert torch.allclose(table[layer].share, expected, rtol=1e-10, atol=0)


def rescaled(net: nn.Module, x: Tensor, size: float = 0.7) -> nn.Module:
    """Return a copy with all scale symmetries of the network applied at random."""
    moved = copy.deepcopy(net).train()
    symmetries = scale_symmetries(moved, x)
    coefficients = np.random.default_rng(3).normal(size=len(symmetries)) * size
    transform(moved, symmetries, coefficients, example_batch=x)
    return moved


def all_of(table: ChannelTable, quantity: str) -> Tensor:
    return table.joined(quantity)


@pytest.mark.parametrize("name", [*CASES, "stream"])
def test_no_symmetry_of_the_network_changes_shares(name: str) -> None:
    """Rescalings of channels, and the free scale of every unit in front of a normalization, with ε → 0."""
    net = stream() if name == "stream" else CASES[name][0]
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-30
    x = images()
    moved = rescaled(net, x)
    before, after = channel_table(net, x), channel_table(moved, x)
    assert torch.allclose(net.eval()(x), moved.eval()(x), rtol=1e-9, atol=1e-9)
    assert torch.allclose(all_of(before, "share"), all_of(after, "share"), rtol=1e-12, atol=0)
    changed = all_of(after, "gamma").abs() / all_of(before, "gamma").abs()
    assert float((changed - 1).abs().max()) > 0.1
    for layer in before.layers:
        assert torch.allclose(before[layer].cosines(), after[layer].cosines(), rtol=0, atol=1e-6)  # ρ is in float32


@pytest.mark.parametrize("name", [*CASES, "stream"])
def test_rescalings_leave_products_and_change_gammas(name: str) -> None:
    net = stream() if name == "stream" else CASES[name][0]
    x = images()
    moved = copy.deepcopy(net).train()
    symmetries = scale_symmetries(moved, x)
    coefficients = np.zeros(len(symmetries))
    chosen = symmetries.in_role("rescaling")
    coefficients[chosen] = np.random.default_rng(1).normal(size=len(chosen))
    transform(moved, symmetries, coefficients, example_batch=x)
    before, after = channel_table(net, x), channel_table(moved, x)
    assert torch.allclose(all_of(before, "product"), all_of(after, "product"), rtol=1e-12, atol=0)
    assert not torch.allclose(all_of(before, "gamma").abs(), all_of(after, "gamma").abs(), rtol=0.1)
    order = [all_of(table, "gamma").abs().argsort().tolist() for table in (before, after)]
    assert order[0] != order[1], "pruning by |γ| depends on a scale without meaning"


REASONS = {
    "tanh": (chain(conv(3, 4), nn.BatchNorm2d(4), nn.Tanh(), conv(4, 2)), "Tanh"),
    "relu6": (chain(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU6(), conv(4, 2)), "Hardtanh"),
    "output": (chain(conv(3, 4), nn.BatchNorm2d(4)), "loss"),
    "absorbed": (
        chain(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, groups=4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)),
        ABSORBED,
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_channels_without_readers_have_a_reason(name: str) -> None:
    net, reason = REASONS[name]
    found = channel_table(net, images())["1"]
    assert reason in found.reason
    assert found.product.isnan().all()
    assert found.share.isnan().all()
    assert not found.writers.any()


def test_a_frozen_network_has_the_same_readers() -> None:
    net, _ = CASES["chain"]
    frozen = copy.deepcopy(net).requires_grad_(False)
    assert torch.equal(
        all_of(channel_table(net, images()), "product"), all_of(channel_table(frozen, images()), "product")
    )
    assert not any(p.requires_grad for p in frozen.parameters())
