"""Kernels and transfers of a measured step, counted on fake CUDA tensors, so that no GPU is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_normgeo import SymmetryMonitor
from lightning_normgeo.callbacks._monitors import session as sessions
from lightning_normgeo.callbacks._monitors.gradients import epsilon_parts
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.probes.cumulative.totals import Totals
from lightning_normgeo.probes.symmetries.probe import SymmetryProbe
from lightning_normgeo.symmetries.charges.slice_sums import slice_sums
from lightning_normgeo.symmetries.slices import Slices
from support.fake_cuda import Bare, Counts, fake_kernels, join_monitors, stub_transfer, take_step
from support.projects import ConvNet, Project
from support.symmetry_parts import Attention, GatedMLP, transformer

OPTIMIZERS = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=1e-3, capturable=True),
}


@pytest.mark.parametrize("cumulative", [False, True], ids=["steps", "cumulative"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_transfer_down_and_none_up(kind: str, cumulative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    brought = stub_transfer(monkeypatch)
    counts = counted_steps(kind, Project, [1, 1, 1], cumulative=cumulative, net=ConvNet)
    assert len(brought) == 3
    assert counts[0].up, "what stays the same is built at the first step, and counted"
    assert counts[-1].up == Counter(), "built on the host"
    assert counts[-1].down == Counter(), "read one by one"


MOST = {"sgd-momentum": 340, "adamw": 335, "adamw-fused": 355, "capturable": 390}
"""Kernels of a measured step; a launch from Python costs 5 to 15 µs. An ordinary step of ResNet-101 has 1,500."""
MOST_CUMULATIVE = {"sgd-momentum": 29, "adamw": 18, "adamw-fused": 40, "capturable": 48}
"""Kernels of a step that only cumulative sums read."""


def slow_but(fast: str) -> list[Any]:
    """Return the optimizers as parameters, of which all but one are marked slow."""
    return [pytest.param(kind, marks=() if kind == fast else pytest.mark.slow) for kind in OPTIMIZERS]


@pytest.mark.parametrize("kind", slow_but("sgd-momentum"))
def test_kernels_do_not_grow_with_the_number_of_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_transfer(monkeypatch)
    found = {}
    for arch in ("resnet18", "resnet101"):
        launched = fake_kernels(monkeypatch)
        net = getattr(torchvision.models, arch)
        counts = counted_steps(kind, Project, [1, 1, 1], net=lambda net=net: net(num_classes=10), pixels=32)
        found[arch] = counts[-1].kernels.total()
        assert counts[-1].up == counts[-1].down == Counter()
        assert max(launched.values()) == 3, "one launch before and one after each step"
    assert 0 < found["resnet101"] <= MOST[kind]
    assert found["resnet101"] - found["resnet18"] < 20, "one more for each layer"


def test_clipping_takes_a_few_more_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """W and g are read once more, right after the backward pass."""
    stub_transfer(monkeypatch)
    launched = fake_kernels(monkeypatch)
    monkeypatch.setattr(epsilon_parts, "may_change_gradients", lambda trainer: True)
    net = torchvision.models.resnet18
    counts = counted_steps("sgd-momentum", Project, [1, 1, 1], net=lambda: net(num_classes=10), pixels=32)
    assert 0 < counts[-1].kernels.total() <= MOST["sgd-momentum"] + 40
    assert counts[-1].up == counts[-1].down == Counter()
    assert launched["weight_kernel"] == 6, "twice in each step"


@pytest.mark.parametrize("kind", slow_but("adamw-fused"))
def test_cumulative_sums_take_few_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_transfer(monkeypatch)
    fake_kernels(monkeypatch)
    net = torchvision.models.resnet101
    counts = counted_steps(kind, Project, [10**6] * 3, cumulative=True, net=lambda: net(num_classes=10), pixels=32)
    assert 0 < counts[-1].kernels.total() <= MOST_CUMULATIVE[kind]
    assert counts[-1].down == Counter()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rows_of_weights_with_channels_last_are_views(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def channels_last() -> nn.Module:
        net = torchvision.models.resnet101(num_classes=10)
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
                layer.weight = nn.Parameter(weight)
        return net

    stub_transfer(monkeypatch)
    fake_kernels(monkeypatch)
    measured = counted_steps(kind, Project, [1, 1, 1], net=channels_last, pixels=32)[-1]
    assert 0 < measured.kernels.total() <= MOST[kind]
    assert measured.up == measured.down == Counter()


class OfImages(nn.Module):
    """Language model that takes the pixels of images for tokens, and whose scores are averaged over them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.flatten(1)[:, :64].abs().long()).mean(1)


def decoder(width: int, heads: int, depth: int, tokens: int) -> nn.Module:
    """Return a decoder with RMS normalizations and gated layers, whose residual stream is one joint unit."""
    attention = partial(Attention, bias=False)
    model = transformer(
        attention=lambda width, _: attention(width, heads),
        feed_forward=partial(GatedMLP, hidden=8 * width // 3),
        norm=nn.RMSNorm,
        width=width,
        depth=depth,
        positions=0,
        tokens=tokens,
    )
    return OfImages(model)


@pytest.mark.parametrize("kind", slow_but("adamw"))
def test_kernels_do_not_grow_with_the_partners_of_joint_units(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_transfer(monkeypatch)
    fake_kernels(monkeypatch)
    found = []
    for depth in (2, 6):
        counts = counted_steps(kind, Project, [1, 1, 1], net=lambda d=depth: decoder(16, 2, d, tokens=8))
        assert counts[-1].up == counts[-1].down == Counter()
        found.append(counts[-1].kernels.total())
    assert found[1] - found[0] <= 2, "joined in batches of 128 tensors"


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_decoder_of_a_billion_parameters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_transfer(monkeypatch)
    fake_kernels(monkeypatch)
    net = partial(decoder, width=1920, heads=15, depth=20, tokens=32_000)
    measured = counted_steps(kind, Project, [1, 1, 1], net=net)[-1]
    cumulative = counted_steps(kind, Project, [10**6] * 3, cumulative=True, net=net)[-1]
    assert 0 < measured.kernels.total() <= 400
    assert 0 < cumulative.kernels.total() <= MOST_CUMULATIVE[kind]
    assert measured.up == measured.down == cumulative.down == Counter()


def counted_steps(
    kind: str,
    project: Any,
    cadences: list[int],
    net: Any,
    pixels: int = 8,
    cumulative: bool = False,
    saved: dict[str, Any] | None = None,
    more: Sequence[Any] = (),
) -> list[Counts]:
    """Return the counts of some steps, with monitors that measure at the first cadence, and further ones.

    ``saved`` are cumulative sums of a checkpoint.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with torch.device("cuda"):
            module = project(net=net())
        optimizer = OPTIMIZERS[kind](module.parameters())
        if kind == "capturable":
            optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
        run = Bare(module, optimizer)
        session = sessions.Session.of(run)
        session.restore_sums(saved or {})
        for monitor in more:
            monitor._cadence = cadences[0]
            session.join(monitor, run, module)
        join_monitors(run, module, cadences[0], cumulative)
        return [take_step(run, module, optimizer, pixels) for _ in cadences]


def test_sums_of_a_checkpoint_go_on_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read on the CPU, and no parameter is new when a training resumes."""
    brought = stub_transfer(monkeypatch)
    names = [name for name, _ in Project(net=ConvNet()).named_parameters()]
    state = {"fields": list(Totals._fields), "sums": {name: [1.0] * len(Totals._fields) for name in names}}
    counted_steps("sgd-momentum", Project, [1, 1], cumulative=True, net=ConvNet)
    counts = counted_steps("sgd-momentum", Project, [1, 1], cumulative=True, net=ConvNet, saved=state)
    assert brought[2:] == brought[:2], "as many values as from the beginning"
    assert counts[-1].up == counts[-1].down == Counter()


@pytest.mark.parametrize("kind", ["sgd-momentum", pytest.param("capturable", marks=pytest.mark.slow)])
def test_symmetries_are_read_without_waiting(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    brought = stub_transfer(monkeypatch)
    monitor = SymmetryMonitor(1)
    counts = counted_steps(kind, Project, [1, 1, 1], net=ConvNet, more=[monitor])
    alone = counted_steps(kind, Project, [1, 1, 1], net=ConvNet)
    assert brought[2] > brought[5], "more values than without it"
    assert counts[-1].up == counts[-1].down == Counter()
    assert counts[-1].kernels.total() - alone[-1].kernels.total() < 350


def test_no_copy_of_weights_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_transfer(monkeypatch)
    held: list[tuple[int, int]] = []
    after = SymmetryProbe.after

    def noted(probe: SymmetryProbe) -> None:
        before = len(probe._buffers)
        after(probe)
        held.append((before, len(probe._buffers)))

    monkeypatch.setattr(SymmetryProbe, "after", noted)
    counted_steps("adamw", Project, [1], net=lambda: decoder(16, 2, 1, tokens=8), more=[SymmetryMonitor(1)])
    ((during, afterwards),) = held
    assert during > 0 == afterwards


def test_large_parameters_are_sliced_in_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch from Python costs as much time as reading a hundred thousand elements."""
    with FakeTensorMode(), Counts() as counts:
        weight = torch.empty(4096, 4096, device="cuda")
        slices = [Slices("weight", (4096, 4096), axes, 4096 * k, sizes) for k, (axes, sizes) in enumerate(WAYS)]
        slice_sums(slices, {"weight": weight}, {"weight": weight}, weight.device)
    assert 0 < counts.kernels.total() < 150, "in eight blocks"


WAYS = [((0,), (4096, 1)), ((1,), (1, 4096))]
"""By rows and by columns: the axes of slices, and their number along each."""


@pytest.mark.parametrize("elsewhere", ["cuda:1", "cpu"])
def test_weights_on_another_device_are_left_out(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of all weights lie in one column, so that one device has them."""

    class Apart(nn.Module):
        """A network whose last layer, or a normalization too, is on another device."""

        def __init__(self) -> None:
            super().__init__()
            self.net = ConvNet()
            with torch.device(elsewhere):
                self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(images).to(elsewhere)).to("cuda:0")

    brought = stub_transfer(monkeypatch)
    with pytest.warns(MeasurementWarning, match="left out: it is on another device than most weights") as said:
        counted_steps("sgd-momentum", Project, [1, 1], cumulative=True, net=Apart, more=[SymmetryMonitor(1)])
    assert len(said) == 1
    assert len(brought) == 2
    assert min(brought) > 100
