"""Projection onto spheres: the function stays, and directions move as in free training with the equivalent rate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim.lion import Lion
from timm.optim.sgdw import SGDW
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_normgeo import scale_symmetries
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.symmetries import Spheres
from support.scripts import load_script

EPS = 1e-60


table = load_script("docs/units.py")


class Stream(nn.Module):
    """A residual stream that a batch-normalized branch and a layer normalization read."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.ins, self.outs = nn.Linear(width, 9), nn.Linear(9, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outs(F.gelu(self.ins(self.norms[0](x))))
        logits: Tensor = self.head(self.norms[1](x))
        return logits


def convolutions(eps: float = EPS) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5, eps=eps), nn.LeakyReLU(0.1), nn.Conv2d(5, 6, 2, bias=False),
        nn.GroupNorm(3, 6, eps=eps), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "stream": (Stream, (16, 5)),
    "convolutions": (convolutions, (8, 2, 6, 6)),
}


def built(name: str) -> tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    network = build().double().train()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (shape[0],), generator=generator)

    return network, batch


def gradients(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    network.zero_grad()
    F.cross_entropy(network(batch[0]), batch[1]).backward()


def sgd(p: Tensor, state: dict[str, Tensor], lr: Any, step: int) -> Tensor:
    state["b"] = 0.9 * state["b"] + p.grad if "b" in state else p.grad.clone()  # type: ignore[operator,union-attr]
    return -lr * state["b"]


def adam(p: Tensor, state: dict[str, Tensor], lr: Any, step: int) -> Tensor:
    g = p.grad
    state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * g  # type: ignore[operator]
    state["v"] = 0.99 * state.get("v", torch.zeros_like(p)) + 0.01 * g * g  # type: ignore[operator]
    return -lr * (state["m"] / (1 - 0.9**step)) / ((state["v"] / (1 - 0.99**step)).sqrt() + EPS)


def lion(p: Tensor, state: dict[str, Tensor], lr: Any, step: int) -> Tensor:
    g, m = p.grad, state.get("m", torch.zeros_like(p))
    direction = (0.9 * m + 0.1 * g).sign()  # type: ignore[operator]
    state["m"] = 0.99 * m + 0.01 * g  # type: ignore[operator]
    return -lr * direction


RULES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], int]] = {
    "SGD": (lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9), sgd, 2),
    "Adam": (lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=EPS), adam, 1),
    "Lion": (lambda groups: Lion(groups, lr=0.003, betas=(0.9, 0.99)), lion, 1),
}
RATES = {"SGD": 0.01, "Adam": 0.01, "Lion": 0.003}


def per_element(spheres: Spheres, values: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return a value of each block for each element of the parameters; 1 for elements of none."""
    found = {}
    for name, parameter in parameters.items():
        whole = torch.ones_like(parameter)
        for part in spheres._parts:
            if part.slices.parameter == name:
                whole = whole * part.spread(values)
        found[name] = whole
    return found


def trained_freely(
    network: nn.Module, batches: Callable[[int], Any], spheres: Spheres, rule: str, blocks: set[str], factors: Any
) -> dict[str, Tensor]:
    """Train without projection for 100 steps at the equivalent rates, and return the parameters on the spheres.

    Args:
        network: trained in place.
        batches: by step.
        spheres: of the network, with the radii r.
        rule: name of the update rule.
        blocks: parameters that belong to blocks.
        factors: of the rate of blocks, of their weights in each step, and of their momentum.
    """
    _, update, power = RULES[rule]
    of_rate, of_weight, of_momentum = factors
    parameters, states = dict(network.named_parameters()), {n: {} for n, _ in network.named_parameters()}  # type: ignore[var-annotated]
    for step in range(1, 101):
        gradients(network, batches(step))
        ratio = per_element(spheres, (spheres.norms() / spheres.radii) ** power, parameters)
        with torch.no_grad():
            for own, p in parameters.items():
                inside = own in blocks
                rate = RATES[rule] * (of_rate if inside else 1.0)
                if inside and "b" in states[own]:
                    states[own]["b"] *= of_momentum
                change = update(p, states[own], rate * ratio[own], step)
                p.mul_(of_weight if inside else 1.0).add_(change)
    expected = per_element(spheres, spheres.radii / spheres.norms(), parameters)
    return {own: p * expected[own] for own, p in parameters.items()}


def trained_on_spheres(name: str, make: Callable[..., Any], decay: float) -> tuple[nn.Module, Spheres, Any]:
    network, batch = built(name)
    start = copy.deepcopy(network)
    spheres = Spheres(scale_symmetries(network, batch(0)[0]), network)
    blocks = {part.slices.parameter for part in spheres.blocks.weights}
    groups = [
        {"params": [p for n, p in network.named_parameters() if n in blocks], "weight_decay": decay},
        {"params": [p for n, p in network.named_parameters() if n not in blocks], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    for step in range(1, 101):
        gradients(network, batch(step))
        optimizer.step()
        spheres.project(optimizer)
    assert torch.allclose(spheres.norms(), spheres.radii, rtol=1e-14)
    return network, Spheres(scale_symmetries(start, batch(0)[0]), start), (start, batch, blocks)


def compare(network: nn.Module, free: dict[str, Tensor]) -> None:
    for own, p in network.named_parameters():
        if own != "0.bias":  # in front of a batch normalization it has no effect and no gradient
            torch.testing.assert_close(p, free[own], rtol=1e-12, atol=1e-12)


# torch's SGD couples weight decay to the gradient
@pytest.mark.parametrize(("rule", "decay"), [(rule, 0.0) for rule in RULES] + [("Adam", 0.5), ("Lion", 0.5)])
@pytest.mark.parametrize("name", NETWORKS)
def test_projected_training_is_free_training_at_another_rate(name: str, rule: str, decay: float) -> None:
    network, twin, (start, batch, blocks) = trained_on_spheres(name, RULES[rule][0], decay)
    compare(network, trained_freely(start, batch, twin, rule, blocks, (1.0, 1 - RATES[rule] * decay, 1.0)))


@pytest.mark.parametrize("name", NETWORKS)
def test_decoupled_decay_is_a_larger_rate_and_less_momentum(name: str) -> None:
    network, twin, (start, batch, blocks) = trained_on_spheres(
        name, lambda groups: SGDW(groups, lr=RATES["SGD"], momentum=0.9), 2.0
    )
    kept = 1 - RATES["SGD"] * 2.0
    compare(network, trained_freely(start, batch, twin, "SGD", blocks, (1 / kept, 1.0, kept)))


def test_radii_are_held_in_float32() -> None:
    torch.manual_seed(0)
    network = convolutions(eps=1e-5)
    spheres = Spheres(scale_symmetries(network, torch.randn(8, 2, 6, 6)), network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(500):
        gradients(network, (torch.randn(8, 2, 6, 6), torch.randint(3, (8,))))
        optimizer.step()
        spheres.project(optimizer)
    assert float((spheres.norms() / spheres.radii - 1).abs().max()) < 2e-7


CASES = [case for case in table.cases() if case[0] in ("resnet18", "vit_b_16", "vgg16_bn", "convolutions with biases")]


@pytest.mark.parametrize(("name", "norm"), CASES[:3])
def test_the_function_stays(name: str, norm: str) -> None:
    check_the_function(name, norm)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), table.cases())
def test_the_function_of_every_network_of_the_table_stays(name: str, norm: str) -> None:
    check_the_function(name, norm)


def check_the_function(name: str, norm: str) -> None:
    torch.manual_seed(0)
    network, x = table.build(name, norm)
    mode = network.training
    for _ in range(3 if mode else 0):
        network(x + 0.1 * torch.randn_like(x))
    symmetries = scale_symmetries(network, x)
    networks = {training: copy.deepcopy(network).train(training) for training in (True, False)}
    spheres = Spheres(symmetries, network)
    spheres.radii = spheres.radii * (0.5 + torch.rand(len(spheres), dtype=torch.float64))
    before = {training: output(one, x) for training, one in networks.items() if training or mode}
    spheres.project()
    assert torch.allclose(spheres.norms(), spheres.radii, rtol=1e-12)
    moved = network.state_dict()
    for training, outputs in before.items():
        clone = copy.deepcopy(network).train(training)
        clone.load_state_dict(moved)
        after = output(clone, x)
        leaves = zip(_leaves(outputs), _leaves(after), strict=True)
        assert all((a - b).detach().abs().max() <= 1e-9 * a.detach().abs().max() for a, b in leaves), training


class Standardized(nn.Conv2d):
    """A convolution with weight standardization, written into its forward."""

    def forward(self, x: Tensor) -> Tensor:
        centered = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centered / centered.pow(2).mean((1, 2, 3), keepdim=True).sqrt(), self.bias)


NORMALIZED_WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "weight normalization": lambda: weight_norm(nn.Conv2d(3, 6, 3)),
    "of the whole weight": lambda: weight_norm(nn.Conv2d(3, 6, 3), dim=None),
    "spectral normalization": lambda: spectral_norm(nn.Conv2d(3, 6, 3)),
    "weight standardization": lambda: Standardized(3, 6, 3),
}


@pytest.mark.parametrize("name", NORMALIZED_WEIGHTS)
def test_the_function_stays_where_a_bias_stands_behind_a_normalized_weight(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(NORMALIZED_WEIGHTS[name](), nn.BatchNorm2d(6, eps=EPS), nn.ReLU()).double()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        network(x)
    spheres = Spheres(scale_symmetries(network, x), network)
    spheres.radii = spheres.radii * (1.5 + torch.rand(len(spheres), dtype=torch.float64))
    network.eval()
    before = network(x)
    spheres.project()
    assert torch.allclose(spheres.norms(), spheres.radii, rtol=1e-12)
    assert torch.allclose(network(x), before, rtol=1e-12, atol=1e-12)


class Complex(nn.Module):
    """Complex weights in front of a batch normalization of real and imaginary parts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4, bias=False, dtype=torch.complex128)
        self.norm = nn.BatchNorm1d(8, eps=EPS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.norm(torch.view_as_real(self.linear(torch.complex(x, x.flip(0)))).flatten(1))
        return outputs


def test_complex_weights_have_the_norm_of_both_parts() -> None:
    torch.manual_seed(0)
    network, x = Complex(), torch.randn(6, 5, dtype=torch.float64)
    symmetries = scale_symmetries(network, x)
    spheres, weight = Spheres(symmetries, network), network.linear.weight
    radii = weight.detach().norm(dim=1)
    (network(x).relu() * torch.randn(8, dtype=torch.float64)).sum().backward()
    charges = torch.from_numpy(symmetries.charges(dict(network.named_parameters())))
    real_parts = (weight.real * weight.grad.real).detach().sum(1)  # type: ignore[union-attr]
    assert float(charges.abs().max()) < 1e-13 < 1e-3 < float(real_parts.abs().max())
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    spheres.project()
    assert torch.allclose(weight.detach().norm(dim=1), radii, rtol=1e-13)


def test_single_numbers_are_left_out() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3, bias=False), nn.BatchNorm2d(3))
    spheres = Spheres(scale_symmetries(network, torch.randn(4, 3, 5, 5)), network)
    assert len(spheres) == 0


def output(network: nn.Module, x: Tensor) -> Any:
    """Return the output, with the same dropout each time."""
    torch.manual_seed(1)
    return network(x)


def _leaves(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def test_blocks_that_the_optimizer_does_not_move_stay_bit_for_bit() -> None:
    network, batch = built("convolutions")
    spheres = Spheres(scale_symmetries(network, batch(0)[0]), network)
    first, second = network[0].weight, network[3].weight  # type: ignore[index]
    optimizer = torch.optim.SGD([second], lr=0.1)
    with torch.no_grad():
        first.mul_(1.5)
    kept = first.clone()
    gradients(network, batch(1))
    optimizer.step()
    factors = spheres.project(optimizer)
    assert torch.equal(first, kept)
    assert int((factors != 1).sum()) == 3


def test_what_cannot_work_is_refused() -> None:
    network, batch = built("convolutions")
    x = batch(0)[0]
    symmetries = scale_symmetries(network, x)
    with pytest.raises(
        ConfigurationError, match=r"2 radii were given for 8 scale-invariant blocks\. Give one for each"
    ):
        Spheres(symmetries, network, torch.ones(2))
    with pytest.raises(ConfigurationError, match="The symmetries are those of another module"):
        Spheres(symmetries, Stream())
    with pytest.raises(ConfigurationError, match=r"stored in torch\.bfloat16, whose rounding is as large as a step"):
        Spheres(symmetries, copy.deepcopy(network).bfloat16())

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["mine"] = torch.zeros_like(p)

    optimizer = Own(network.parameters(), lr=0.1)
    optimizer.step()
    before = copy.deepcopy(network.state_dict())
    spheres = Spheres(symmetries, network)
    spheres.radii = spheres.radii * 2
    with pytest.raises(ConfigurationError, match="It is not known how the state 'mine' of Own scales"):
        spheres.project(optimizer)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
