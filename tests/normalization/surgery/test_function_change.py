"""swap_norm measures the change of the function in evaluation mode, and skips layers whose function would change."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import NORMS, swap_norm
from support.small_models import Net, PreActivation, conv_bn, worn, x2d

EXACT = ["none", "wn", "sn", "wn+mbn"]


def function(net: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a copy in evaluation mode, in float64."""
    return copy.deepcopy(net).double().eval()(x.double()).detach()


def relative(after: Tensor, before: Tensor) -> float:
    return ((after - before).norm() / before.norm()).item()


def pre_activation() -> nn.Module:
    blocks = [PreActivation(4, 4), PreActivation(4, 6)]
    return nn.Sequential(nn.Conv2d(4, 4, 3), *blocks, nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1))


def everything(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(net: nn.Module, before: dict[str, Tensor]) -> bool:
    state = net.state_dict()
    return list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in before)


# measured changes


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("to", [name for name in NORMS if name != "bn"])
@pytest.mark.parametrize("build", [conv_bn, pre_activation])
def test_the_number_is_that_of_an_independent_comparison(build: Callable[[], nn.Module], to: str, given: bool) -> None:
    net, x = worn(build()), x2d(2, size=12)
    before = copy.deepcopy(net)
    report = swap_norm(net, to, example_batch=x if given else None)
    if not given:
        size = 64 if to in ("in", "ln", "gn", "gn+ws") else 32
        assert report.example == f"(2, 4, {size}, {size})"
        x = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0))[:1]
    if not given and to not in EXACT:
        assert report.change is None
        assert "function in evaluation mode: not measured: pass example_batch" in str(report)
        return
    change = relative(function(net, x), function(before, x))
    assert report.change == pytest.approx(change, rel=1e-4, abs=3e-6)
    assert report.kept == (change < 1e-3)
    assert report.keeps == report.kept == (to in EXACT)
    if to in EXACT:
        assert "function in evaluation mode: kept (relative change " in str(report)
    else:
        assert f"function in evaluation mode: changed by {change:.2g} of its size, {to} does not keep it" in str(report)


def test_the_change_of_a_layer_is_its_own() -> None:
    """Each layer gets its original inputs, so that the second layer is not blamed for the change of the first."""
    net = worn(nn.Sequential(*conv_bn(), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    x = x2d(2, size=8)
    before = copy.deepcopy(net)
    first, second = swap_norm(net, "gn", example_batch=x).changes
    hidden = function(before[:2], x)
    assert first.change == pytest.approx(relative(function(net[:2], x), hidden), rel=1e-5)
    assert second.change == pytest.approx(relative(function(net[2:], hidden), function(before[2:], hidden)), rel=1e-5)


class Counting(Net):
    """Layer that counts its calls, stores its input and overrides modes, as models with frozen statistics do."""

    calls = 0

    def train(self, mode: bool = True) -> Counting:
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.last = self.calls + 1, x
        return super().forward(x)


@pytest.mark.parametrize("given", [True, False])
def test_measuring_leaves_no_trace(given: bool) -> None:
    shared = nn.BatchNorm2d(4)
    chain = nn.Sequential(nn.Conv2d(4, 4, 3), shared, nn.Dropout(), nn.Conv2d(4, 4, 3), shared)
    net = worn(Counting(lambda m, x: m.bn(m.conv(m.net(x))), net=chain, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)))
    net.train()
    buffers, values = dict(chain.named_buffers()), everything(chain)
    modes = {name: child.training for name, child in net.named_modules()}
    x, random_state = x2d(size=9), torch.get_rng_state()
    swap_norm(net, "wn+mbn", layers="bn", example_batch=x if given else None)
    assert torch.equal(torch.get_rng_state(), random_state) or given
    assert {name: child.training for name, child in net.named_modules() if "param" not in name} == modes
    assert all(chain.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert same(chain, values)
    assert (net.calls, hasattr(net, "last")) == (0, False)
    assert not any(child._forward_hooks for child in net.modules())


# swaps that would not keep the function


def scaled(m: Net, x: Tensor) -> Tensor:
    return m.bn(F.conv2d(x, m.conv.weight * 0.1))  # the model does not use the bias that folding adds to the layer


def read_elsewhere(m: Net, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) + m.conv.weight.detach().mean()


def statistics_read(m: Net, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) * m.bn.running_var.mean()


def two_readers(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) + y


def hooked() -> nn.Module:
    net = conv_bn()
    net[0].register_forward_hook(lambda *args: args[-1].roll(1, 1))
    return net


def rectified() -> nn.Module:
    norm = type("Rectified", (nn.BatchNorm2d,), {"forward": lambda s, x: nn.BatchNorm2d.forward(s, x).relu()})(6)
    return nn.Sequential(nn.Conv2d(4, 6, 3), norm)


def of(run: Callable[[Net, Tensor], Tensor]) -> nn.Module:
    return Net(run, conv=nn.Conv2d(4, 6, 3, bias=False), bn=nn.BatchNorm2d(6))


SILENT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "functional": (lambda: of(scaled), "computes more than torch's own layers do"),
    "read elsewhere": (lambda: of(read_elsewhere), "something else in the model reads what would change"),
    "statistics": (lambda: of(statistics_read), r"the model does not run without it \(.*running_var"),
    "two readers": (lambda: of(two_readers), "conv is not directly in front of this layer alone"),
    "hook": (hooked, "0 is not directly in front of this layer alone"),
    "forward": (rectified, "the forward of Rectified replaced"),
    "dropout": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout(), nn.BatchNorm2d(6)), "not directly in front"),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("case", "to"),
    [
        (case, to)
        for case in SILENT
        for to in ("none", "wn", "wn+mbn")
        if (case, to) != ("functional", "wn+mbn")  # keeps β in a layer of its own, and so the function
    ],
)
def test_no_change_is_silent(case: str, to: str, given: bool) -> None:
    build, why = SILENT[case]
    net = nn.Sequential(worn(build()), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    x, inside, parameters = x2d(size=9), everything(net[0]), dict(net[0].named_parameters())
    expected = function(net, x)
    report = swap_norm(net, to, example_batch=x if given else None)
    assert [change.name for change in report.changes] == ["2"]
    (left,) = report.left
    with pytest.raises(ConfigurationError, match=why):
        raise ConfigurationError(left.reason)
    assert same(net[0], inside)
    assert all(parameter is parameters[name] for name, parameter in net[0].named_parameters())
    torch.testing.assert_close(function(net, x), expected, rtol=1e-4, atol=1e-4)
    assert report.kept


def test_layers_that_are_put_back_are_what_an_optimizer_holds() -> None:
    net = nn.Sequential(worn(of(two_readers)), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    swap_norm(net, "wn", example_batch=x2d(), optimizer=optimizer)
    net = worn(conv_bn())
    before, text = everything(net), repr(net)
    with pytest.raises(ConfigurationError, match="SGD holds parameters"):
        swap_norm(net, "wn", example_batch=x2d(), optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    assert same(net, before)
    assert repr(net) == text


# models that cannot be measured


def fails_in_evaluation(m: Net, x: Tensor) -> Tensor:
    if not m.training:
        raise RuntimeError("no evaluation here")
    return m.bn(m.conv(x))


def random_function(m: Net, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) * (1 + random.SystemRandom().random())  # no state to restore


def not_finite(m: Net, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) / 0


UNMEASURED = {
    "fails": (fails_in_evaluation, r"the model fails in evaluation mode \(no evaluation here\)"),
    "random": (random_function, "the model is random: it gives other outputs for the same input"),
    "infinite": (not_finite, r"its outputs are not finite for an input of shape \(2, 4, 9, 9\)"),
}


@pytest.mark.parametrize("case", UNMEASURED)
def test_what_cannot_be_measured_is_said(case: str) -> None:
    run, why = UNMEASURED[case]
    net, x = worn(of(run)).train(), x2d(2, size=9)
    report = swap_norm(net, "none", example_batch=x)  # traced, and directly in front: folded
    assert report.change is report.kept is report.changes[0].change is None
    with pytest.raises(ConfigurationError, match=f"function in evaluation mode: not measured: {why}"):
        raise ConfigurationError(str(report))
    net = worn(Net(lambda m, x: run(m, x) + m.conv(x), conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))).train()
    with pytest.raises(ConfigurationError, match=f"would be dropped .*could not be measured: {why}"):
        swap_norm(net, "none", example_batch=x)


@pytest.mark.parametrize("to", ["none", "wn+mbn"])
def test_without_values_nothing_is_measured(to: str) -> None:
    with torch.device("meta"):
        net = conv_bn()
    assert swap_norm(net, to).unmeasured == "the model is on the meta device and has no values"
