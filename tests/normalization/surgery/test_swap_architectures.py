"""swap_norm on torchvision's architectures with every normalization, under a Trainer, and on two processes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import NORMS, SwapReport, swap_norm
from lightning_normgeo.normalization.surgery.norm_layers import Layers
from support.ddp_swap import swapped_and_trained
from support.isolation import SUPPORT
from support.processes import reports_of
from support.small_models import feeders, worn

SCRIPT = SUPPORT / "ddp_swap.py"
SIZE = 64  # 2x2 positions remain after a stride of 32, which instance normalization needs
SMALL = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 2)]


def vgg() -> nn.Module:
    model = torchvision.models.vgg11_bn(num_classes=3, init_weights=False)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 3)
    return model


ARCHITECTURES: dict[str, Any] = {
    "resnet18": torchvision.models.resnet18,
    "vgg11_bn": vgg,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "densenet": functools.partial(torchvision.models.DenseNet, block_config=(3, 2, 2, 2)),
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "googlenet": functools.partial(torchvision.models.googlenet, aux_logits=False, init_weights=False),
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
    "mnasnet0_5": torchvision.models.mnasnet0_5,
    "regnet_y_400mf": torchvision.models.regnet_y_400mf,
    "convnext": functools.partial(ConvNeXt, SMALL),
}


@functools.cache
def built(arch: str) -> nn.Module:
    torch.manual_seed(0)
    build = ARCHITECTURES[arch]
    return build() if build is vgg else build(num_classes=3)


def expected_parameters(model: nn.Module, report: SwapReport) -> dict[str, int]:
    """Return name and size of the documented parameters after a swap."""
    norm, sizes = NORMS[report.to], {name: p.numel() for name, p in model.named_parameters()}
    layers = dict(model.named_modules())
    for change in report.changes:
        rows = sizes[f"{change.name}.weight"]
        if norm.data in (None, "mbn"):
            del sizes[f"{change.name}.weight"]
        if norm.data is None:
            del sizes[f"{change.name}.bias"]
        _, folded, into = change.note.partition("folded into weight and bias of ")
        if folded:
            sizes[f"{into}.bias"] = rows
        for weight in change.weights:
            stem = f"{weight}.parametrizations.weight"
            size, outputs = sizes.pop(f"{weight}.weight"), layers[weight].weight.shape[0]
            if norm.weight == "wn":
                sizes |= {f"{stem}.original0": outputs, f"{stem}.original1": size}
            else:
                sizes[f"{stem}.original"] = size
                if norm.data is None:
                    sizes[f"{stem}.1.gain"] = 1 if norm.weight == "sn" else outputs
    return sizes


def pairs() -> Iterator[Any]:
    """Yield architectures and normalizations; of the pairs that differ little from others those marked slow."""
    for arch in ARCHITECTURES:
        for to in NORMS:
            often = arch == "resnet18" or to in ("gn", "wn", "none", "bn")
            yield pytest.param(arch, to, marks=() if often else pytest.mark.slow)


@pytest.mark.parametrize(("arch", "to"), list(pairs()))
def test_every_architecture_takes_every_normalization(arch: str, to: str) -> None:
    original = built(arch)
    model = copy.deepcopy(original)
    if to == "bn" and arch != "convnext":
        with pytest.raises(ConfigurationError, match="would change nothing"):
            swap_norm(model, to)
        return
    batch = torch.rand(2, 3, SIZE, SIZE)
    report = swap_norm(model, to, example_batch=batch if to == "in" else None)  # "in" is skipped at single positions
    before = {name for name, layer in original.named_modules() if isinstance(layer, Layers)}
    assert {change.name for change in report.changes} | {entry.name for entry in report.left} == before
    assert len(report.changes) + len(report.left) == len(before)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sizes == expected_parameters(original, report)
    assert (report.parameters_before, report.parameters_after) == (
        sum(p.numel() for p in original.parameters()),
        sum(sizes.values()),
    )
    y = model.train()(batch)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_is_left_alone() -> None:
    """Initial statistics have no effect; trained ones behind concatenations cannot be folded (DenseNet, ConvNeXt)."""
    assert len(swap_norm(copy.deepcopy(built("densenet")), "wn").changes) == 23
    net = worn(copy.deepcopy(built("densenet")))
    report = swap_norm(net, "wn", example_batch=torch.rand(2, 3, 32, 32))
    assert {entry.name.rpartition(".")[2] for entry in report.left} == {"norm1", "norm", "norm5"}
    assert all(
        "more than one weight in front" in entry.reason or "not directly" in entry.reason for entry in report.left
    )
    assert report.kept
    report = swap_norm(copy.deepcopy(built("convnext")), "gn")
    assert [entry.name for entry in report.left] == ["features.1.0.block.2", "features.3.0.block.2"] + [
        f"features.5.{i}.block.2" for i in range(2)
    ]


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in ("densenet", "convnext")])
def test_order_and_graph_agree_where_convolutions_are_directly_in_front(arch: str) -> None:
    model = copy.deepcopy(built(arch))
    assert feeders(model) == feeders(model, torch.rand(2, 3, SIZE, SIZE))


def test_the_graph_sees_through_concatenations() -> None:
    model = copy.deepcopy(built("densenet"))
    ordered, seen = feeders(model), feeders(model, torch.rand(2, 3, 32, 32))
    stem, block = "features.conv0", "features.denseblock1.denselayer"
    assert seen[f"{block}3.norm1"] == [stem, f"{block}1.conv2", f"{block}2.conv2"]
    assert f"{block}3.norm1" not in ordered
    assert seen[f"{block}3.norm2"] == ordered[f"{block}3.norm2"] == [f"{block}3.conv1"]
    assert len(seen) == 23


@functools.lru_cache(maxsize=1)
def trained(arch: str) -> nn.Module:
    """Return a model with γ, β and statistics unlike the initial ones, in float64 and evaluation mode."""
    torch.manual_seed(2)
    model = copy.deepcopy(built(arch)).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, -1.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
            layer.momentum = 0.5
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(4, 3, 32, 32, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("to", ["none", "wn", "sn", "wn+mbn"])
@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_trained_model_keeps_its_function(arch: str, to: str, traced: bool) -> None:
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = trained(arch)(x)
    model = copy.deepcopy(trained(arch))
    report = swap_norm(model, to, example_batch=x if traced else None)
    assert all("folded into weight" in change.note for change in report.changes)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def processes(workplace: Path) -> list[dict[str, Any]]:
    """Train on two processes, with a data-based and a weight-based normalization."""
    return reports_of(SCRIPT, workplace, timeout=300)


@pytest.mark.parametrize("to", ["gn", "wn"])
def test_two_processes_train_as_one(processes: list[dict[str, Any]], to: str) -> None:
    first, second = (rank[to] for rank in processes)
    assert first["weights"] == second["weights"]
    alone = swapped_and_trained(to, devices=1)
    assert alone["weights"].keys() == first["weights"].keys()
    for name, values in alone["weights"].items():
        torch.testing.assert_close(torch.tensor(first["weights"][name]), torch.tensor(values), rtol=1e-4, atol=1e-5)
    assert alone["changed"]


def test_a_model_in_the_hands_of_ddp_is_refused(processes: list[dict[str, Any]]) -> None:
    assert all("wrapped by DistributedDataParallel" in rank[to]["refused"] for rank in processes for to in ("gn", "wn"))
