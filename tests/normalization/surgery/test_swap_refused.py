"""swap_norm refuses impossible swaps, and swaps of parameters that an optimizer already has."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import NORMS, swap_norm
from lightning_normgeo.normalization.layers import MeanOnlyBatchNorm
from support.projects import ConvNet, Project, images, trainer
from support.small_models import PAIRS, conv_bn, x2d


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(6, 3), nn.BatchNorm2d(6))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "unknown": (ConvNet, {"to": "wnn"}, r"to='wnn' is unknown; did you mean 'wn' \(weight normalization\)"),
    "groups": (
        ConvNet,
        {"to": "gn", "groups": 4},
        r"1: groups=4 does not divide 6 channels. Choose a divisor, such as 3",
    ),
    "zero-groups": (
        ConvNet,
        {"to": "gn", "groups": 0},
        r"groups=0 must be an integer, at least 1",
    ),
    "other-groups": (ConvNet, {"to": "wn", "groups": 2}, r"groups=2 is for group normalization, not for 'wn'"),
    "no-norms": (lambda: nn.Linear(2, 3), {"to": "gn"}, r"Linear has no normalization layers that swap_norm could"),
    "same": (ConvNet, {"to": "bn"}, r"swap_norm\(to='bn'\) would change nothing: 1: it is batch normalization already"),
    "root": (
        lambda: nn.BatchNorm2d(3),
        {"to": "gn"},
        r"is itself a normalization \(BatchNorm2d\).*Give the model that",
    ),
    "glob": (
        ConvNet,
        {"to": "gn", "layers": "layer*"},
        r"layers='layer\*': 'layer\*' matches none of the 2 norm.*'1', '4'",
    ),
    "globs": (ConvNet, {"to": "gn", "layers": ["1", "5"]}, r"layers=\['1', '5'\]: '5' matches none of the 2"),
    "no-globs": (ConvNet, {"to": "gn", "layers": []}, r"layers=\[\]: 'an empty list' matches none of the 2"),
    "batch": (
        ConvNet,
        {"to": "wn", "example_batch": torch.empty(0)},
        r"ConvNet cannot take the example batch \(shape \(0,\)\)",
    ),
    "channels": (
        ConvNet,
        {"to": "wn", "example_batch": x2d()},
        r"cannot take the example batch \(shape \(3, 4, 6, 6\)\)",
    ),
    "lazy-norm": (lambda: nn.Sequential(nn.LazyBatchNorm2d()), {"to": "gn"}, r"0 is a lazy layer without shape yet"),
    "lazy-conv": (lazy, {"to": "gn"}, r"0 is a lazy layer without shape yet. Run one forward pass before swap_norm"),
    "parallel": (lambda: nn.DataParallel(ConvNet()), {"to": "gn"}, r"a model wrapped by DataParallel.*wrap afterwards"),
    "compiled": (
        lambda: torch.compile(ConvNet()),
        {"to": "gn"},
        r"a compiled model. Swap first and call torch.compile",
    ),
    "one-position": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
        {"to": "in"},
        r"would change nothing: 1: its input has one position",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_as_it_was(case: str) -> None:
    build, settings, message = REFUSED[case]
    net = build()
    described, state = repr(net), None if "lazy" in case else {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message):
        swap_norm(net, **settings)
    assert repr(net) == described
    assert state is None or all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_compiled_in_place() -> None:
    net = ConvNet()
    net.compile()
    with pytest.raises(ConfigurationError, match="compiled model"):
        swap_norm(net, "gn")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_zero_fan_in() -> None:
    net = nn.Sequential(nn.Conv2d(0, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    report = swap_norm(net, "wn")
    assert [(entry.name, entry.reason) for entry in report.left] == [
        ("1", "0, which feeds it, cannot be parametrized: it has no inputs (zero fan-in)")
    ]
    assert "folded" in swap_norm(net, "none").changes[0].note


def test_a_model_inside_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ConvNet())
        for model in (wrapped, nn.Sequential(wrapped)):
            with pytest.raises(ConfigurationError, match="a model wrapped by DistributedDataParallel"):
                swap_norm(model, "gn")
    finally:
        torch.distributed.destroy_process_group()


# optimizers created before the swap

OPTIMIZED = [
    ("gn", "4", "1", False),
    ("wn", "*", "*", True),
    ("none", "*", "*", True),
    ("wn+mbn", "*", "*", True),
    ("bn+ws", "*", "*", False),  # the weights stay the same parameters
    ("ws", "*", "*", True),
    ("wn", "4", "1", False),  # the optimizer has none of the parameters that change
]


@pytest.mark.parametrize(("to", "layers", "held", "refused"), OPTIMIZED)
def test_an_optimizer_that_exists_already(to: str, layers: str, held: str, refused: bool) -> None:
    net = ConvNet()
    optimizer = torch.optim.SGD(net.parameters() if held == "*" else net[int(held)].parameters(), lr=0.1)
    if refused:
        with pytest.raises(ConfigurationError, match="SGD holds parameters of the model that swap_norm would replace"):
            swap_norm(net, to, layers=layers, optimizer=optimizer)
    else:
        swap_norm(net, to, layers=layers, optimizer=optimizer)


def test_an_optimizer_that_would_miss_a_parameter() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.LayerNorm([6, 4, 4]), nn.ReLU(), MeanOnlyBatchNorm(6))
    for layers in ("1", "3"):
        with pytest.raises(ConfigurationError, match="holds parameters of the model"):
            swap_norm(net, "gn", layers=layers, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    assert "γ added" in swap_norm(net, "gn", layers="3").changes[0].note


def test_gamma_without_beta_stays_without() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.LayerNorm([6, 1, 1], bias=False), nn.ReLU())
    swap_norm(net, "gn")
    assert net[1].bias is None
    gamma, optimizer = net[1].weight, torch.optim.SGD(net.parameters(), lr=0.1)
    for to in ("bn", "in", "ln"):
        assert "β" not in swap_norm(net, to, optimizer=optimizer).changes[0].note
        assert dict(net[1].named_parameters()) == {"weight": gamma}
        net(x2d()).sum().backward()


@pytest.mark.parametrize("to", [name for name in PAIRS if NORMS[name].weight != "wn"])
def test_weights_without_gain_stay_the_same_parameters(to: str) -> None:
    net = conv_bn()
    before = list(net.parameters())
    swap_norm(net, to, optimizer=torch.optim.SGD(before, lr=0.1))
    assert {id(p) for p in net.parameters()} == {id(p) for p in before}


def test_a_trainer_is_asked_while_it_runs() -> None:
    class Swapping(Project):
        def on_train_start(self) -> None:
            with pytest.raises(ConfigurationError, match="SGD holds parameters"):
                swap_norm(self, "wn")
            swap_norm(self, "gn")

    class Configured(Project):
        def configure_model(self) -> None:
            if not any(isinstance(m, nn.Identity) for m in self.modules()):
                swap_norm(self, "wn")

    project = Swapping()
    trainer(steps=1).fit(project, images(8))
    assert type(project.net[1]) is nn.GroupNorm
    swap_norm(project, "wn")  # the Trainer has finished and will create a new optimizer
    project = Configured()
    trainer(steps=1).fit(project, images(8))
    assert math.isfinite(project.net[0].weight.sum().item())
