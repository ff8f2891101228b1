"""Units found from the graph are the ones for which ⟨W, ∇W⟩ vanishes, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo.geometry import weight_gradient_cosine
from lightning_normgeo.normalization.units import WeightUnits, named_weights, units_from_graph, units_from_modules
from tests.projects import ConvNet

EPS = 1e-60  # so that in float64 nothing is left but rounding


class Net(nn.Module):
    """Layers by name and how to run them."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(out: int = 6, bias: bool = False, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(4, out, 3, padding=1, bias=bias, **settings)


def chain(*layers: nn.Module) -> Net:
    return Net(lambda m, x: m.chain(x), chain=nn.Sequential(*layers))


def bn(channels: int = 6) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPS)


def residual_before(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.conv(x) + x)


def residual_after(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)) + x


def used_twice(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.conv(m.conv(x)))


def two_readers(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + y


def functional(m: Net, x: Tensor) -> Tensor:
    return F.batch_norm(m.conv(x), None, None, training=True, eps=EPS)


def generator(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.linear(x.flatten(1)).view(len(x), 3, 2, 2))


def shuffled(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y.view(len(y), 2, 3, 4, 4).transpose(1, 2).reshape(y.shape))


def turned(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.conv(x).transpose(1, 2))


def halved(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.linear(x.flatten(1)).view(2 * len(x), 6))


def frozen(net: Net) -> Net:
    net.norm.eval()
    return net


CASES: dict[str, tuple[Net, str]] = {
    "batch-norm": (chain(conv(), bn()), "filter"),
    "batch-norm-bias": (chain(conv(bias=True), bn()), "filter"),
    "relu-batch-norm": (chain(conv(), nn.ReLU(), bn()), "filter"),
    "pool-batch-norm": (chain(conv(), nn.MaxPool2d(2), bn()), "filter"),
    "bias-relu-batch-norm": (chain(conv(bias=True), nn.ReLU(), bn()), "none"),
    "gelu-batch-norm": (chain(conv(), nn.GELU(), bn()), "none"),
    "no-norm": (chain(conv()), "none"),
    "depthwise": (chain(conv(8, groups=4), bn(8)), "filter"),
    "transposed": (chain(nn.ConvTranspose2d(4, 6, 2, bias=False), bn()), "filter"),
    "linear": (chain(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5, eps=EPS)), "filter"),
    "instance-norm": (chain(conv(), nn.InstanceNorm2d(6, eps=EPS)), "filter"),
    "group-norm": (chain(conv(), nn.GroupNorm(3, 6, eps=EPS)), "group"),
    "group-norm-bias": (chain(conv(bias=True), nn.GroupNorm(3, 6, eps=EPS)), "none"),
    "layer-norm": (chain(conv(), nn.LayerNorm([6, 4, 4], eps=EPS, elementwise_affine=False)), "layer"),
    "layer-norm-linear": (chain(nn.Flatten(), nn.Linear(64, 5, bias=False), nn.LayerNorm(5, eps=EPS)), "layer"),
    "functional": (Net(functional, conv=conv()), "filter"),
    "residual-before": (Net(residual_before, conv=conv(4), norm=bn(4)), "none"),
    "residual-after": (Net(residual_after, conv=conv(4), norm=bn(4)), "filter"),
    "used-twice": (Net(used_twice, conv=conv(4), norm=bn(4)), "none"),
    "two-readers": (Net(two_readers, conv=conv(), norm=bn()), "none"),
    "generator": (Net(generator, linear=nn.Linear(64, 12, bias=False), norm=bn(3)), "group"),
    "generator-bias": (Net(generator, linear=nn.Linear(64, 12), norm=bn(3)), "none"),
    "channel-shuffle": (Net(shuffled, conv=conv(), norm=nn.GroupNorm(3, 6, eps=EPS)), "none"),
    "transposed-channels": (Net(turned, conv=conv(4), norm=bn(4)), "none"),
    "transposed-channels-group": (Net(turned, conv=conv(4), norm=nn.GroupNorm(2, 4, eps=EPS)), "none"),
    "split-into-samples": (Net(halved, linear=nn.Linear(64, 12), norm=nn.BatchNorm1d(6, eps=EPS)), "none"),
    "split-into-samples-group": (Net(halved, linear=nn.Linear(64, 12, bias=False), norm=nn.GroupNorm(2, 6)), "none"),
    "frozen": (frozen(Net(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=bn())), "none"),
}


def cosines(net: nn.Module) -> tuple[tuple[WeightUnits, ...], dict[str, Tensor]]:
    torch.manual_seed(1)
    net = net.double()
    x = torch.randn(7, 4, 4, 4, dtype=torch.float64)
    y = net(x)
    loss = (y * torch.randn_like(y)).sum() + y.pow(3).sum()
    units = units_from_graph(net, loss)
    loss.backward()
    weights = dict(named_weights(net))
    found = {u.name: weight_gradient_cosine(u.rows(weights[u.name]), u.rows(weights[u.name].grad)) for u in units}
    return units, found


@pytest.mark.parametrize(("net", "kind"), CASES.values(), ids=CASES.keys())
def test_kind_and_orthogonality(net: Net, kind: str) -> None:
    (units,), found = cosines(net)
    assert units.kind == kind, units.reason
    largest = float(found[units.name].abs().max())
    assert largest < 1e-12 if kind != "none" else largest > 1e-3
    assert units.invariant or units.reason


@pytest.mark.parametrize("name", ["group-norm", "layer-norm", "generator"])
def test_finer_units_would_be_wrong(name: str) -> None:
    """The paper's "every row" fails where rows share their statistics."""
    net, _ = CASES[name]
    cosines(net)
    ((_, weight),) = named_weights(net)
    weight.grad = None
    torch.manual_seed(2)
    y = net(torch.randn(7, 4, 4, 4, dtype=torch.float64))
    (y * torch.randn_like(y)).sum().backward()
    assert weight_gradient_cosine(weight.flatten(1), weight.grad.flatten(1)).abs().max().item() > 1e-2


def test_resnet_units_and_their_scales() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    loss = model(torch.rand(2, 3, 32, 32)).logsumexp(1).sum()
    units = units_from_graph(model, loss)
    assert len(units) == 21
    assert {u.kind for u in units[:-1]} == {"filter"}
    assert units[-1].name == "fc.weight"
    assert not units[-1].invariant
    scales = {u.name: u.scale for u in units}
    assert scales["conv1.weight"] == "bn1.weight"
    assert scales["layer2.0.downsample.0.weight"] == "layer2.0.downsample.1.weight"


def test_registration_order_agrees_with_the_graph_on_plain_networks() -> None:
    model = ConvNet()
    loss = model(torch.rand(4, 3, 8, 8)).sum()
    assert [(u.name, u.kind, u.scale) for u in units_from_modules(model)] == [
        (u.name, u.kind, u.scale) for u in units_from_graph(model, loss)
    ]


def test_a_gamma_that_something_else_reads_predicts_no_epsilon_part() -> None:
    """Network slimming: the penalty's gradient is in γ.grad, and not a part of the normalization's."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    loss = model(torch.rand(4, 3, 8, 8)).square().sum()
    assert units_from_graph(model, loss)[0].scale == "1.weight"
    assert units_from_graph(model, loss + 0.1 * model[1].weight.abs().sum())[0].scale is None


def test_weights_the_loss_does_not_depend_on_are_left_out() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    assert [u.name for u in units_from_graph(model, model["used"](torch.rand(4, 3)).sum())] == ["used.weight"]
