"""Units found from the graph are exactly those for which ⟨W, ∇W⟩ vanishes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_normgeo.geometry import as_rows, weight_gradient_cosine
from lightning_normgeo.normalization import normalize_weight
from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.normalization.autograd.zero_constants import ZeroConstants
from lightning_normgeo.normalization.parametrizations import WeightStandardization
from lightning_normgeo.symmetries import WeightUnits, guess_units, scale_invariant_units, units_from_graph
from lightning_normgeo.symmetries.units.discovery import search
from support.projects import ConvNet
from support.small_models import Net

EPS = 1e-60  # so that only float64 rounding remains


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


def joined(m: Net, x: Tensor) -> Tensor:
    """DenseNet: the input of a normalization is a concatenation."""
    return m.norm(torch.cat([x, m.conv(x)], 1))


def by_hand(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    centered = y - y.mean((0, 2, 3), keepdim=True)
    return centered / (centered.square().mean((0, 2, 3), keepdim=True) + EPS).sqrt()


def rms_by_hand(m: Net, x: Tensor) -> Tensor:
    y = m.linear(x.flatten(1))
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)


def siamese(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)) * m.norm(m.conv(x.flip(0)))


def gated(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x).chunk(2, 1)
    return m.norm(a) * b.sigmoid()


def multiplied(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x).chunk(2, 1)
    return a.relu() * b


def sliced(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y[:, :4]) + m.other(y[:, 2:])


def centered_twice(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y - y.mean(1, keepdim=True))


def normalized_weight(m: Net, x: Tensor) -> Tensor:
    return F.conv2d(x, F.normalize(m.conv.weight.flatten(1)).view_as(m.conv.weight), padding=1).sigmoid()


def halves(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x).chunk(2, 1)
    return m.norm(a + b)


def attention_maps(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y[:, :1] * x + y[:, 1:2] * x)


def copied_twice(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    n, c, h, w = y.shape
    in_turn, in_blocks = y[:, :, None].expand(n, c, 2, h, w), y[:, None].expand(n, 2, c, h, w)
    return m.norm(in_turn.reshape(n, 2 * c, h, w) + in_blocks.reshape(n, 2 * c, h, w))


def squash(m: Net, x: Tensor) -> Tensor:
    """Squash function of a capsule network: its constant 1 is not an ε."""
    y = m.conv(x)
    square = y.square().sum(1, keepdim=True)
    return square / (1 + square) * y / square.sqrt()


def added_first(m: Net, x: Tensor) -> Tensor:
    return m.norm(torch.addmm(m.other(x.flatten(1)), x.flatten(1), m.linear.weight.t()))


def variance_and_mean(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    variance, mean = torch.var_mean(y, (0, 2, 3), keepdim=True)
    return (y - mean) / (variance + EPS).sqrt()


def standardized_as_published(m: Net, x: Tensor) -> Tensor:
    """Weight standardization as in Qiao's code, with an expanded deviation."""
    centered = m.conv.weight - m.conv.weight.mean((1, 2, 3), keepdim=True)
    deviation = centered.view(len(centered), -1).std(1).view(-1, 1, 1, 1) + EPS
    return F.conv2d(x, centered / deviation.expand_as(centered)).sigmoid()


def with_weight(change: Callable[[Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    return lambda m, x: m.norm(F.conv2d(x, change(m.conv.weight)))


def then(function: Callable[[Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    return lambda m, x: m.norm(function(m.conv(x)))


def weighted(kind: str, layer: nn.Module, gain: bool = True) -> Net:
    normalize_weight(layer, kind, gain)
    for child in layer.modules():
        if isinstance(child, WeightStandardization):
            child.eps = EPS
    return chain(layer, nn.Sigmoid())


def ln(*shape: int) -> nn.LayerNorm:
    return nn.LayerNorm(list(shape), eps=EPS)


def gn(groups: int = 3, channels: int = 6) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=EPS)


torch.manual_seed(0)  # else the networks would depend on the tests collected before
LINEAR, SHORT = nn.Linear(64, 12), nn.Linear(64, 12, bias=False)
CASES: dict[str, tuple[Net, str]] = {
    "batch-norm": (chain(conv(), bn()), "filter"),
    "batch-norm-bias": (chain(conv(bias=True), bn()), "filter"),
    "relu-batch-norm": (chain(conv(), nn.ReLU(), bn()), "filter"),
    "pool-batch-norm": (chain(conv(), nn.MaxPool2d(2), bn()), "filter"),
    "average-pool-batch-norm": (chain(conv(bias=True), nn.AvgPool2d(3, 1, padding=1), bn()), "filter+bias"),
    "upsampled-batch-norm": (chain(conv(bias=True), nn.Upsample(scale_factor=2), bn()), "filter"),
    "bias-relu-batch-norm": (chain(conv(bias=True), nn.ReLU(), bn()), "filter+bias"),
    "gelu-batch-norm": (chain(conv(), nn.GELU(), bn()), "none"),
    "dropout-batch-norm": (chain(conv(), nn.Dropout(0.3), bn()), "filter"),
    "no-norm": (chain(conv()), "none"),
    "depthwise": (chain(conv(8, groups=4), bn(8)), "filter"),
    "separable": (chain(conv(8, groups=4), nn.Conv2d(8, 5, 1, bias=False), bn(5)), "layer"),
    "deeper": (chain(conv(bias=True), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=3, bias=False), gn()), "group+bias"),
    "transposed": (chain(nn.ConvTranspose2d(4, 6, 2, bias=False), bn()), "filter"),
    "transposed-group-norm": (chain(nn.ConvTranspose2d(4, 6, 2), gn()), "group+bias"),
    "transposed-grouped": (chain(nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), bn()), "filter"),
    "transposed-grouped-group-norm": (chain(nn.ConvTranspose2d(4, 6, 2, groups=2), gn(2)), "group+bias"),
    "linear": (chain(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5, eps=EPS)), "filter"),
    "instance-norm": (chain(conv(), nn.InstanceNorm2d(6, eps=EPS)), "filter"),
    "instance-norm-bias": (chain(conv(bias=True), nn.InstanceNorm2d(6, eps=EPS)), "filter"),
    "group-norm": (chain(conv(), gn()), "group"),
    "group-norm-bias": (chain(conv(bias=True), gn()), "group+bias"),
    "group-norm-of-channels": (chain(conv(bias=True), gn(6)), "filter"),
    "layer-norm": (chain(conv(), nn.LayerNorm([6, 4, 4], eps=EPS, elementwise_affine=False)), "layer"),
    "layer-norm-bias": (chain(conv(bias=True), ln(6, 4, 4)), "layer+bias"),
    "layer-norm-linear": (chain(nn.Flatten(), nn.Linear(64, 5, bias=False), ln(5)), "layer"),
    "layer-norm-linear-bias": (chain(nn.Flatten(), nn.Linear(64, 5), ln(5)), "layer+bias"),
    "layer-norm-tokens": (chain(nn.Flatten(2), nn.Linear(16, 5), ln(5)), "layer+bias"),
    "rms-norm": (chain(nn.Flatten(), nn.Linear(64, 5, bias=False), nn.RMSNorm(5, eps=EPS)), "layer"),
    "rms-norm-bias": (chain(nn.Flatten(), nn.Linear(64, 5), nn.RMSNorm(5, eps=EPS)), "layer+bias"),
    "rms-by-hand": (Net(rms_by_hand, linear=nn.Linear(64, 5, bias=False)), "layer"),
    "functional": (Net(functional, conv=conv()), "filter"),
    "by-hand": (Net(by_hand, conv=conv()), "filter"),
    "residual-before": (Net(residual_before, conv=conv(4), norm=bn(4)), "none"),
    "residual-after": (Net(residual_after, conv=conv(4), norm=bn(4)), "filter"),
    "used-twice": (Net(used_twice, conv=conv(4), norm=bn(4)), "layer"),
    "siamese": (Net(siamese, conv=conv(), norm=bn()), "filter"),
    "two-readers": (Net(two_readers, conv=conv(), norm=bn()), "none"),
    "concatenated": (Net(joined, conv=conv(), norm=bn(10)), "filter"),
    "concatenated-instance-norm": (Net(joined, conv=conv(), norm=nn.InstanceNorm2d(10, eps=EPS)), "filter"),
    "concatenated-group-norm": (Net(joined, conv=conv(), norm=gn(5, 10)), "group"),
    "multiplied-halves": (Net(multiplied, conv=conv()), "none"),
    "gated": (Net(gated, conv=conv(), norm=bn(3)), "none"),
    "sliced": (Net(sliced, conv=conv(), norm=bn(4), other=bn(4)), "filter"),
    "centered-by-hand": (Net(centered_twice, conv=conv(), norm=bn()), "layer"),
    "generator": (Net(generator, linear=SHORT, norm=bn(3)), "group"),
    "generator-bias": (Net(generator, linear=LINEAR, norm=bn(3)), "group+bias"),
    "channel-shuffle": (Net(shuffled, conv=conv(), norm=gn()), "none"),
    "transposed-channels": (Net(turned, conv=conv(4), norm=bn(4)), "layer"),
    "transposed-channels-group": (Net(turned, conv=conv(4), norm=gn(2, 4)), "layer"),
    "split-into-samples": (Net(halved, linear=nn.Linear(64, 12), norm=nn.BatchNorm1d(6, eps=EPS)), "none"),
    "split-into-samples-group": (Net(halved, linear=nn.Linear(64, 12, bias=False), norm=gn(2)), "group"),
    "frozen": (frozen(Net(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=bn())), "none"),
    "weight-norm": (weighted("wn", conv(bias=True)), "filter"),
    "weight-norm-transposed": (weighted("wn", nn.ConvTranspose2d(4, 6, 2)), "filter"),
    "weight-norm-linear": (chain(nn.Flatten(), weighted("wn", nn.Linear(64, 5))), "filter"),
    "weight-norm-of-all": (chain(parametrizations.weight_norm(conv(), dim=None), nn.Sigmoid()), "matrix"),
    "centered-weight-norm": (weighted("cwn", conv(bias=True)), "filter"),
    "centered-weight-norm-transposed": (weighted("cwn", nn.ConvTranspose2d(4, 6, 2)), "filter"),
    "weight-standardization": (weighted("ws", conv(bias=True), gain=False), "filter"),
    "spectral-norm": (weighted("sn", conv(bias=True)), "matrix"),
    "spectral-norm-transposed": (weighted("sn", nn.ConvTranspose2d(4, 6, 2), gain=False), "matrix"),
    "normalized-weight": (Net(normalized_weight, conv=conv()), "filter"),
    "softsign-batch-norm": (chain(conv(), nn.Softsign(), bn()), "none"),
    "prelu-batch-norm": (chain(conv(), nn.PReLU(), bn()), "filter"),
    "clamp-below-zero": (Net(then(lambda y: y.clamp(min=-0.5)), conv=conv(), norm=bn()), "none"),
    "clamp-at-zero": (Net(then(lambda y: y.clamp(min=0)), conv=conv(), norm=bn()), "filter"),
    "clamp-by-tensor": (Net(then(lambda y: y.clamp(min=y.new_full((6, 1, 1), -0.5))), conv=conv(), norm=bn()), "none"),
    "square-of-sum": (Net(then(lambda y: (y + 1).pow(2)), conv=conv(), norm=bn()), "none"),
    "exponent": (Net(then(lambda y: 2**y), conv=conv(), norm=bn()), "none"),
    "noisy-weight": (Net(with_weight(lambda w: w + torch.ones_like(w)), conv=conv(), norm=bn()), "none"),
    "part-of-weight": (Net(with_weight(lambda w: w[:4]), conv=conv(), norm=gn(2, 4)), "none"),
    "sum-of-halves": (Net(halves, conv=conv(), norm=bn(3)), "none"),
    "attention-maps": (Net(attention_maps, conv=conv(2), norm=bn(4)), "layer"),
    "copied-twice": (Net(copied_twice, conv=conv(), norm=bn(12)), "layer"),
    "two-group-norms": (Net(lambda m, x: m.a(m.conv(x)) + m.b(m.conv(x)), conv=conv(), a=gn(2), b=gn(3)), "layer"),
    "cut-before-group-norm": (Net(then(lambda y: y[:, 1:5]), conv=conv(8), norm=gn(2, 4)), "none"),
    "uneven-view": (
        Net(then(lambda y: y.flatten(2).view(7, 8, 12)), conv=conv(), norm=nn.GroupNorm(4, 8, EPS)),
        "group",
    ),
    "added-in-product": (Net(added_first, linear=nn.Linear(64, 6), other=nn.Linear(64, 6), norm=ln(6)), "none"),
    "squash": (Net(squash, conv=conv()), "none"),
    "variance-and-mean": (Net(variance_and_mean, conv=conv()), "filter"),
    "standardized-as-published": (Net(standardized_as_published, conv=conv()), "filter"),
    "weight-norm-of-inputs": (chain(parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 2)), nn.Sigmoid()), "filter"),
    "standardized-before-group-norm": (chain(weighted("ws", conv()).chain[0], gn()), "filter"),
}


def cosines(net: nn.Module) -> tuple[tuple[WeightUnits, ...], dict[str, Tensor]]:
    torch.manual_seed(1)
    net = net.double()
    net.zero_grad()
    x = torch.randn(7, 4, 4, 4, dtype=torch.float64)
    with ZeroConstants() as constants:
        y = net(x)
        loss = (y * torch.randn_like(y)).sum() + y.pow(3).sum()
    _, units = search(net, Graph(loss, constants=constants.records()), joint=False)
    loss.backward()
    return units, {u.name: joint_cosine(net, u) for u in units}


def joint_cosine(net: nn.Module, units: WeightUnits) -> Tensor:
    """Return cos((W, b), gradient) for each unit, with the bias where it belongs to them."""
    parameters = dict(net.named_parameters())
    parts = [parameters[name] for name in (units.name, units.bias) if name is not None]
    weight, gradient = (
        torch.cat([units.rows(tensor) for tensor in tensors], 1) for tensors in (parts, [p.grad for p in parts])
    )
    return weight_gradient_cosine(weight, gradient)


@pytest.mark.parametrize(("net", "expected"), CASES.values(), ids=CASES.keys())
def test_kind_and_orthogonality(net: Net, expected: str) -> None:
    (units, *_), found = cosines(net)
    assert units.kind + ("+bias" if units.bias else "") == expected, units.reason or units.normalization
    largest = float(found[units.name].detach().abs().max())
    assert largest < 1e-12 if units.invariant else largest > 1e-3
    assert bool(units.normalization) is units.invariant
    assert bool(units.reason) is not units.invariant


JOINT = {"group": 2, "layer": 1, "matrix": 1}


@pytest.mark.parametrize(
    "name", [name for name, (_, kind) in CASES.items() if kind.split("+")[0] in JOINT and name != "centered-by-hand"]
)
def test_finer_units_would_be_wrong(name: str) -> None:
    """The paper's "every row" is wrong where rows share their statistics."""
    net, _ = CASES[name]
    (units, *_), _ = cosines(net)
    weight = dict(net.named_parameters())[units.name]
    rows = [as_rows(t, t.shape[units.dim] * units.groups, units.dim, units.groups) for t in (weight, weight.grad)]
    assert weight_gradient_cosine(*rows).abs().max().item() > 1e-2


@pytest.mark.parametrize("name", [name for name, (_, kind) in CASES.items() if kind.endswith("+bias")])
def test_without_the_bias_a_joint_unit_would_be_wrong(name: str) -> None:
    net, _ = CASES[name]
    (units, *_), _ = cosines(net)
    bias = dict(net.named_parameters())[units.bias]
    assert bias.grad.abs().max() > 1e-3
    assert replace(units, bias=None) != units
    assert joint_cosine(net, replace(units, bias=None)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gelu-batch-norm", "^GELU is in its way$"),
        ("residual-before", "^a sum with something that does not scale is in its way$"),
        ("two-readers", "^a sum with something that does not scale is in its way$"),
        ("frozen", r"frozen statistics \(evaluation mode\)"),
        ("channel-shuffle", "are not consecutive"),
        ("split-into-samples", "are not consecutive"),
        ("multiplied-halves", "^its scale is exchanged with that of other slices of its own$"),
        ("no-norm", "^a sum with something that does not scale is in its way$"),
        ("squash", "^a sum with something that does not scale is in its way$"),
    ],
)
def test_reasons(name: str, reason: str) -> None:
    (units, *_), _ = cosines(CASES[name][0])
    assert re.search(reason, units.reason), units.reason


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
    assert [(u.name, u.kind, u.scale) for u in guess_units(model)] == [
        (u.name, u.kind, u.scale) for u in units_from_graph(model, loss)
    ]


def test_a_gamma_that_something_else_reads_predicts_no_epsilon_part() -> None:
    """Network slimming: the penalty's gradient is in γ.grad, but is not part of the normalization's gradient."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    loss = model(torch.rand(4, 3, 8, 8)).square().sum()
    assert units_from_graph(model, loss)[0].scale == "1.weight"
    assert units_from_graph(model, loss + 0.1 * model[1].weight.abs().sum())[0].scale is None


def test_a_weight_that_is_an_output_too_has_no_units() -> None:
    model = Net(lambda m, x: (m.norm(m.conv(x)), m.conv.weight), conv=conv(), norm=bn())  # type: ignore[arg-type,return-value]
    reason = scale_invariant_units(model, torch.rand(2, 4, 4, 4))["conv"].reason
    assert reason == "it reaches the loss"


def test_the_columns_of_a_matrix_that_is_multiplied_from_the_right() -> None:
    model = nn.ParameterList([torch.rand(5, 3, dtype=torch.float64)])
    loss = F.batch_norm(torch.rand(7, 5, dtype=torch.float64) @ model[0], None, None, training=True, eps=EPS)
    (units,) = units_from_graph(model, (loss * torch.rand(7, 3)).sum())
    assert (units.kind, units.count, units.dim) == ("filter", 3, 1)


def test_weights_the_loss_does_not_depend_on_are_left_out() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    assert [u.name for u in units_from_graph(model, model["used"](torch.rand(4, 3)).sum())] == ["used.weight"]


class Packed(nn.Module):
    """Attention whose queries and keys are rows of one weight, behind a normalization without γ."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(4, 12, bias=False), nn.LayerNorm(4, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(self.norm(x)).chunk(3, -1)
        return (queries @ keys.transpose(-2, -1)).softmax(-1) @ values  # type: ignore[no-any-return]


def test_slices_of_one_weight_that_rescale_each_other_are_named() -> None:
    reason = scale_invariant_units(Packed(), torch.randn(2, 5, 4))["qkv"].reason
    assert reason == "its scale is exchanged with that of other slices of its own"
