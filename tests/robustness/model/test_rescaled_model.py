"""Rescaled scale-invariant weights: the same function up to ε, the same gradients, results and effective norms."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo import NORMS, ResNetClassifier, swap_norm
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import Ball, InputSpace, RobustnessEvaluator, RobustnessSettings, projected_gradient
from lightning_normgeo.robustness.model.rescaled_model import RescaledModel, effective_norms
from support.projects import same
from support.small_models import Net, PreActivation


def conv(inputs: int, outputs: int, size: int = 3, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=bias)


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)]


def plain(bias: bool = False) -> nn.Sequential:
    blocks = [nn.Sequential(conv(a, 8, bias=bias), nn.BatchNorm2d(8), nn.ReLU()) for a in (3, 8, 8)]
    return nn.Sequential(*blocks, *head(8))


def separable(bias: bool = False) -> nn.Sequential:
    """Depthwise-separable convolutions as in MobileNet, one without a normalization between the two."""
    apart = [conv(8, 8, 3, 8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU6()]
    joint = [conv(8, 8, 3, 8, bias), conv(8, 12, 1, 1, bias), nn.BatchNorm2d(12), nn.ReLU()]
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), *apart, *joint, *head(12))


def before_relu() -> nn.Sequential:
    """The bias is not centered away: only weight and bias are jointly invariant."""
    return nn.Sequential(conv(3, 8, bias=True), nn.ReLU(), nn.BatchNorm2d(8), *head(8))


def dense() -> Net:
    """A batch normalization whose input concatenates outputs of different scales."""
    layers = {"first": conv(3, 4), "bn1": nn.BatchNorm2d(4), "second": conv(4, 4), "bn2": nn.BatchNorm2d(8)}

    def run(net: Net, x: Tensor) -> Tensor:
        y = net.bn1(net.first(x)).relu()
        return net.head(net.bn2(torch.cat([y, net.second(y)], 1)).relu())

    return Net(run, **layers, head=nn.Sequential(*head(8)))


def residual() -> nn.Sequential:
    return nn.Sequential(conv(3, 4), PreActivation(4, 8), PreActivation(8, 8), *head(8))


def features() -> nn.Sequential:
    hidden = [nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12, affine=False)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(12, 5))


def resnet(norm: str) -> nn.Module:
    settings = {"groups": 8} if norm.startswith("gn") else {}
    return ResNetClassifier(num_classes=5, arch="resnet18", norm=norm, stem="imagenet", **settings)


def swapped(norm: str) -> nn.Module:
    net = plain()
    if norm != "bn":
        swap_norm(net, norm, **({"groups": 4} if norm.startswith("gn") else {}))
    return net


# builder of the model, and its weights without invariance
NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "biases": (lambda: plain(bias=True), ["5"]),
    "separable": (separable, ["15"]),
    "separable with biases": (lambda: separable(bias=True), ["15"]),
    "bias before ReLU": (before_relu, ["5"]),
    "dense": (dense, ["head.2"]),
    # a weight whose output is added to a skip connection is not invariant
    "residual": (residual, ["0", "1.conv2", "1.shortcut", "2.conv2", "5"]),
    "features": (features, ["6"]),
    "resnet bn": (lambda: resnet("bn"), ["model.fc"]),
    "resnet gn+ws": (lambda: resnet("gn+ws"), ["model.fc"]),
    **{name: (lambda name=name: swapped(name), ["5"]) for name in NORMS if name != "none"},
}
# either no ε anywhere, or the normalized weight and the statistics do not change, which compensates the ε of WS
EXACT = ["wn", "cwn", "sn", "wn+mbn", "bn+cwn", "bn+sn", "bn+ws"]


def built(name: str, eps: float | None = 1e-30) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a partly trained model in evaluation mode, with images and labels."""
    net, x, y = copy.deepcopy(trained(name))
    for layer in net.modules():
        if eps is not None and isinstance(getattr(layer, "eps", None), float):
            layer.eps = eps
    return net, x, y


@functools.cache
def trained(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    net = NETS[name][0]().double()
    size = 32 if "resnet" in name else 8
    x, y = torch.rand(8, 3, size, size, dtype=torch.float64), torch.randint(5, (8,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net((x + 0.1 * step).clamp(max=1)), y).backward()
        optimizer.step()
    return net.eval(), x, y


def seen(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and the gradient with respect to the images."""
    x = x.clone().requires_grad_()
    logits = net(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, y), x)[0]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def attacked(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    adversarial = projected_gradient(net, x, y, Ball("linf", 8 / 255, 0.0, 1.0), 2 / 255, 5)
    with torch.no_grad():
        return net(adversarial).argmax(1)


def state_of(net: nn.Module) -> dict[str, object]:
    return {
        "state": net.state_dict(),
        "gradients": [p.grad for p in net.parameters()],
        "trained": [p.requires_grad for p in net.parameters()],
        "modes": [child.training for child in net.modules()],
        "random": torch.get_rng_state(),
        "hooks": [(len(c._forward_hooks), len(c._forward_pre_hooks)) for c in net.modules()],
    }


def identities(net: nn.Module) -> list[int]:
    return [id(t) for t in (*net.parameters(), *net.buffers())]


@pytest.mark.parametrize(("name", "factor"), [*((name, 10.0) for name in NETS), ("bn", 0.3), ("separable", 1000.0)])
def test_function_gradients_and_decisions_stay_while_norms_change(name, factor):
    net, x, y = built(name)
    rescaled = RescaledModel(net, net, x, factor)
    assert rescaled.unscaled == NETS[name][1]
    expected, decisions, before = seen(net, x, y), attacked(net, x, y), dict(net.named_parameters())
    with rescaled.active():
        found, again, now = seen(net, x, y), attacked(net, x, y), dict(net.named_parameters())
    assert distance(found[0], expected[0]) <= 1e-10
    assert distance(found[1], expected[1]) <= 1e-9
    assert torch.equal(again, decisions)
    assert rescaled.difference <= 1e-10
    longer = {n for n in before if distance(now[n].norm(), factor * before[n].norm()) <= 1e-12}
    unchanged = {n for n in before if torch.equal(now[n], before[n])}
    assert unchanged | longer == set(before)
    assert sum(before[n].ndim > 1 for n in longer) == len(rescaled.layers)
    for old, new in rescaled.layers.values():
        assert new == pytest.approx(factor * old, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in NETS if name not in EXACT and "resnet" not in name])
def test_difference_is_that_of_epsilon(name):
    differences = []
    for eps in (1e-5, 1e-7):
        net, x, _ = built(name, eps)
        differences.append(RescaledModel(net, net, x).difference)
    assert differences[0] > 1e-9
    assert differences[1] / differences[0] == pytest.approx(1e-2, rel=0.2)


@pytest.mark.parametrize("factor", [0.5, 10.0, 1000.0])
def test_output_of_a_normalization_changes_by_the_documented_factor(factor):
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, eps=1e-3)).double().eval()
    net[1].running_var.uniform_(0.1, 2)
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    variance, plain_output = net[1].running_var.view(-1, 1, 1), net(x)
    with RescaledModel(net, net, x, factor).active():
        output = net(x)
    expected = ((variance + 1e-3) / (variance + 1e-3 / factor**2)).sqrt()
    assert distance(output, expected * plain_output) <= 1e-12


@pytest.mark.parametrize("name", ["bn", "biases", "separable", "bias before ReLU", "dense", "residual"])
def test_without_the_statistics_the_function_is_another(name):
    """A check that the control itself can fail."""
    net, x, _ = built(name)
    rescaled, wrong = RescaledModel(net, net, x), copy.deepcopy(net)
    with torch.no_grad():
        for layer in rescaled.layers:
            wrong.get_parameter(f"{layer}.weight").mul_(10)
        assert distance(wrong(x), net(x)) > 0.3


def test_ratios_multiply_along_a_path_and_differ_by_channel():
    for name, norm in (("separable", "11"), ("separable with biases", "11")):
        net, x, _ = built(name)
        ratios = RescaledModel(net, net, x).ratios
        assert ratios.pop(norm) == pytest.approx((100, 100), rel=1e-10)
        assert all(ratio == pytest.approx((10, 10), rel=1e-10) for ratio in ratios.values())
    net, x, _ = built("dense")
    assert RescaledModel(net, net, x).ratios["bn2"] == pytest.approx((1, 10), rel=1e-10)


def test_a_power_of_two_is_exact_in_single_precision_but_for_epsilon():
    net, x, y = built("resnet bn", 1e-30)
    net, x = net.float(), x.float()
    rescaled, expected = RescaledModel(net, net, x, 8.0), seen(net, x, y)
    with rescaled.active():
        assert same(seen(net, x, y), expected)


def test_dead_channels_do_not_hide_the_ratio():
    net, x, _ = built("separable")
    with torch.no_grad():
        net[1].bias[:3] = -100
        net[7].bias[2:6] = -100
        expected = net(x)
        rescaled = RescaledModel(net, net, x)
        net[1].bias.zero_()
        net[7].bias.zero_()
        alive = net(x)
        with rescaled.active():
            assert distance(net(x), alive) <= 1e-10
    assert distance(alive, expected) > 1e-3
    net, x, _ = built("bias before ReLU")
    with torch.no_grad():
        net[0].bias[2] = -100  # dead for any images, like the other channels
    assert RescaledModel(net, net, x).ratios["2"] == pytest.approx((10, 10), rel=1e-10)


def test_effective_norms_stay():
    net, x, _ = built("resnet bn", None)
    rescaled, before = RescaledModel(net, net, x), effective_norms(net, net, x)
    with rescaled.active():
        after = effective_norms(net, net, x)
    assert set(before) == set(after) == set(rescaled.layers)
    for name, norms in before.items():
        assert after[name]["raw"] == pytest.approx(10 * norms["raw"], rel=1e-12)
        assert after[name]["effective"] == pytest.approx(norms["effective"], rel=1e-3)


@pytest.mark.parametrize("fold", [True, False])
def test_evaluator_counts_the_same(fold):
    net, x, y = built("resnet bn", None)
    rescaled = RescaledModel(net, net, x)

    def decisions() -> dict[str, Tensor]:
        settings = RobustnessSettings(attacks=["bim"], fold=fold)
        evaluator = RobustnessEvaluator(net, InputSpace(None, None, normalized_data=False), settings, net)
        evaluator.put(x, y, range(len(y)))
        found = evaluator.finish()
        return {attack: found.of(attack).prediction for attack in ("clean", "bim")}

    expected = decisions()
    assert not torch.equal(expected["bim"], expected["clean"])
    with rescaled.active():
        assert same(decisions(), expected)


@pytest.mark.parametrize("name", ["bn", "sn", "separable with biases"])
@pytest.mark.parametrize("frozen", [False, True])
def test_model_is_left_as_it_was(name, frozen):
    net, x, _ = built(name)
    net[1].train()
    if frozen:
        net.requires_grad_(False)
    before, tensors = copy.deepcopy(state_of(net)), identities(net)
    rescaled = RescaledModel(net, net, x)
    assert len(rescaled.layers) > 2
    assert same(state_of(net), before)
    with pytest.raises(RuntimeError), rescaled.active():
        net(x[0, 0])
    with rescaled.active():
        assert not same(state_of(net), before)
    assert same(state_of(net), before)
    assert identities(net) == tensors


def test_model_is_left_as_it_was_by_a_call_that_fails():
    net, x, _ = built("separable")
    before, tensors = copy.deepcopy(state_of(net)), identities(net)
    for last in range(4):
        calls: list[int] = []

        def failing(images: Tensor, last: int = last, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            if len(calls) > last:
                raise ZeroDivisionError
            return net(images)

        with pytest.raises((ZeroDivisionError, ConfigurationError)):
            RescaledModel(net, failing, x)
        assert len(calls) == last + 1
        assert same(state_of(net), before)
        assert identities(net) == tensors


def test_calls_the_model_in_the_users_way_and_scales_tied_weights_once():
    torch.manual_seed(0)
    first, second = conv(4, 4), conv(4, 4)
    second.weight = first.weight
    body = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4), *head(4)).double().eval()
    x = torch.rand(6, 8, 8, 4, dtype=torch.float64)

    def logits(images: Tensor) -> Tensor:
        return body(images.permute(0, 3, 1, 2))[:, :3]

    for layer in (body[1], body[4]):
        layer.eps = 1e-30
    rescaled, expected, norm = RescaledModel(body, logits, x), logits(x), first.weight.norm()
    with rescaled.active():
        assert distance(logits(x), expected) <= 1e-10
        assert first.weight is second.weight
        assert distance(first.weight.norm(), 10 * norm) <= 1e-12


@pytest.mark.parametrize("build", [lambda: swapped("none"), lambda: nn.Sequential(conv(3, 8, bias=True), *head(8))])
def test_refuses_a_network_without_scale_invariant_weights(build: Callable[[], nn.Module]) -> None:
    net = build().eval()
    with pytest.raises(ConfigurationError, match="no scale-invariant weight that could be multiplied by 7"):
        RescaledModel(net, net, torch.rand(4, 3, 8, 8), 7.0)


def test_refuses_what_is_no_control():
    net, x, _ = built("bn")
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigurationError, match="only positive numbers"):
            RescaledModel(net, net, x, factor)
    with pytest.raises(ConfigurationError, match="compiled model"):
        RescaledModel(torch.compile(net), net, x)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.mul_(1e-4)
            layer.eps = 1e-3
    with pytest.raises(ConfigurationError, match="eps is not small"):
        RescaledModel(net, net, x)


@pytest.mark.parametrize("name", ["bn", "sn", "separable with biases"])
def test_images_that_are_not_finite_do_not_count(name):
    net, x, _ = built(name)
    expected = RescaledModel(net, net, x)
    broken = torch.cat([x, x[:2]])
    broken[-1, 0, 3, 3], broken[-2] = float("nan"), float("inf")
    found = RescaledModel(net, net, broken)
    assert found.layers == expected.layers
    assert found.difference == pytest.approx(expected.difference, rel=1e-3)
    for layer, ratios in expected.ratios.items():
        assert found.ratios[layer] == pytest.approx(ratios, rel=1e-3)


def test_without_finite_values_the_reason_is_said():
    net, x, _ = built("bn")
    with pytest.raises(ConfigurationError, match="is finite nowhere in these images"):
        RescaledModel(net, net, x * float("nan"))
    with torch.no_grad():
        net[-1].bias.fill_(float("inf"))
    with pytest.raises(ConfigurationError, match="No image has finite logits"):
        RescaledModel(net, net, x)


def test_refuses_a_normalization_of_inputs_of_different_scale():
    torch.manual_seed(0)
    shared = Net(lambda net, x: net.fc(net.bn(net.first(x)) + net.bn(x)), first=nn.Linear(6, 6), bn=nn.BatchNorm1d(6))
    shared.add_module("fc", nn.Linear(6, 3))
    x = torch.rand(8, 6)
    with pytest.raises(ConfigurationError, match="'bn' does not scale by one number"):
        RescaledModel(shared.eval(), shared, x)
