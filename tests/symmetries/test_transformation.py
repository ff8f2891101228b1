"""Transformations along symmetries leave the function of a network as it is, in training and in evaluation mode."""

import lion_pytorch
import numpy as np
import pytest
import pytorch_optimizer
import timm.optim
import torch
from torch import nn

from lightning_normgeo import scale_symmetries
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.symmetries import transform
from support.symmetric_networks import NETWORKS, loss_of, network, symmetric
from support.tensors import draw


def losses(module, batch):
    return [float(loss_of(module.train(mode), batch).detach()) for mode in (True, False)]


def combination(symmetries, seed, size=0.3):
    return size * np.random.default_rng(seed).normal(size=len(symmetries))


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_is_the_same_in_both_modes(name):
    module, batch, symmetries = symmetric(name)
    before = losses(module, batch)
    weights = [p.detach().clone() for p in module.parameters()]
    for seed in range(3):
        transform(module.train(seed % 2 == 0), symmetries, combination(symmetries, seed), example_batch=batch)
        assert module.training == (seed % 2 == 0)
        assert losses(module, batch) == pytest.approx(before, rel=1e-12, abs=1e-13)
    factors = [(p / w).detach() for p, w in zip(module.parameters(), weights, strict=True)]
    assert max(float(factor.max()) for factor in factors) > 1.5


@pytest.mark.parametrize("name", ["convolutions", "pre-activation", "gpt", "vision transformer"])
def test_without_biases_before_batch_norms_no_batch_is_needed(name):
    module, batch, symmetries = symmetric(name)
    before = losses(module, batch)
    transform(module, symmetries, torch.from_numpy(combination(symmetries, 0)))
    assert losses(module, batch) == pytest.approx(before, rel=1e-12)


def test_statistics_that_shift_need_a_batch():
    module, batch, symmetries = symmetric("convolutions with biases")
    weights = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ConfigurationError, match="Give example_batch"):
        transform(module, symmetries, combination(symmetries, 0))
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
    rescalings = np.zeros(len(symmetries))
    rescalings[symmetries.in_role("rescaling")] = 0.3
    before = losses(module, batch)
    transform(module, symmetries, rescalings)
    assert losses(module, batch) == pytest.approx(before, rel=1e-12)


class Gated(nn.Module):
    """A residual branch with a gain of one number, as in ReZero."""

    def __init__(self):
        super().__init__()
        self.branch, self.gain, self.head = nn.Linear(4, 4), nn.Parameter(torch.tensor(0.5)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x + self.gain * torch.relu(self.branch(x)))


def test_parameters_without_axes_are_scaled_with_their_states():
    torch.manual_seed(0)
    module, x = Gated().double(), draw(6, 4)
    symmetries = scale_symmetries(module, x)
    optimizer = torch.optim.Adam(module.parameters())
    module(x).pow(2).sum().backward()
    optimizer.step()
    before, gain = module(x).detach(), module.gain.item()
    average = float(optimizer.state[module.gain]["exp_avg"])
    transform(module, symmetries, [0.7], optimizer)
    assert torch.allclose(module(x), before, rtol=1e-12)
    assert abs(np.log(module.gain.item() / gain)) == pytest.approx(0.7)
    assert float(optimizer.state[module.gain]["exp_avg"]) == pytest.approx(average * gain / module.gain.item())


def test_the_inverse_restores_weights_and_statistics():
    module, batch, symmetries = symmetric("pre-activation with biases")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for sign in (1, -1):
        transform(module, symmetries, sign * combination(symmetries, 0), example_batch=batch)
    for name, value in module.state_dict().items():
        assert torch.allclose(value, before[name], rtol=1e-12, atol=1e-13), name


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.0, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.0, amsgrad=True),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.0),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=0.0),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.0, eps=1e-200),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.0, momentum=0.9, centered=True, eps=1e-200),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.0),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=0.0, eps=1e-200),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.0, step_sizes=(0.0, 50.0)),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.0, t0=0),
    "muon": lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2], lr=0.0),
    "sgdw": lambda ps: timm.optim.SGDW(ps, lr=0.0, momentum=0.9),
    "sgdp": lambda ps: timm.optim.SGDP(ps, lr=0.0, momentum=0.9),
    "adamp": lambda ps: timm.optim.AdamP(ps, lr=0.0),
    "nadamw": lambda ps: timm.optim.NAdamW(ps, lr=0.0),
    "adopt": lambda ps: timm.optim.Adopt(ps, lr=0.0, eps=1e-200, clip_exp=None),
    "laprop": lambda ps: timm.optim.LaProp(ps, lr=0.0, eps=1e-200),
    "lamb": lambda ps: timm.optim.Lamb(ps, lr=0.0, max_grad_norm=None),
    "lion": lambda ps: timm.optim.Lion(ps, lr=0.0),
    "lion-pytorch": lambda ps: lion_pytorch.Lion(ps, lr=1e-300),
    "ademamix": lambda ps: pytorch_optimizer.AdEMAMix(ps, lr=0.0),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_are_those_of_gradients_at_the_new_weights(kind):
    """At learning rate 0 the states depend on the gradients alone, which change from batch to batch."""
    states = []
    for first in (True, False):
        module, batch, symmetries = symmetric("gpt with relu")
        optimizer = OPTIMIZERS[kind](module.parameters())
        if first:
            transform(module, symmetries, combination(symmetries, 0), optimizer)
        own = [p for group in optimizer.param_groups for p in group["params"]]
        alive = torch.ones(sum(p.numel() for p in own), dtype=torch.bool)
        for seed in range(4):
            optimizer.zero_grad()
            loss_of(module, (batch + seed) % 7).backward()
            alive &= torch.cat([p.grad.flatten() for p in own]).abs() > 1e-9  # the others are rounding
            optimizer.step()
        if not first:
            transform(module, symmetries, combination(symmetries, 0), optimizer)
        states.append([optimizer.state[p] for p in own])
    tensors = [(key, value) for state in states[0] for key, value in state.items() if isinstance(value, torch.Tensor)]
    for key in {key for key, value in tensors if value.numel() > 1}:
        one, other = (torch.cat([state[key].flatten() for state in found])[alive] for found in states)
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-12 * float(one.abs().max())), key


def test_unknown_states_are_refused():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["shape_of_things"] = p.detach().clone()

    module, batch, symmetries = symmetric("relu perceptron")
    optimizer = Own(module.parameters(), lr=0.1)
    coefficients = combination(symmetries, 0)
    transform(module, symmetries, coefficients, optimizer)  # there is no state yet
    loss_of(module, batch).backward()
    optimizer.step()
    with pytest.raises(ConfigurationError, match=r"shape_of_things.*clear the state"):
        transform(module, symmetries, coefficients, optimizer)


@pytest.mark.parametrize("given", [[1.0], "all", None, [float("nan")] * 9, torch.zeros(3, 3)], ids=str)
def test_coefficients_that_do_not_fit_are_refused(given):
    module, _, symmetries = symmetric("relu perceptron")
    assert len(symmetries) == 9
    with pytest.raises(ConfigurationError, match="one finite number for each of the 9"):
        transform(module, symmetries, given)


def test_overflow_and_other_modules_are_refused():
    module, _, symmetries = symmetric("relu perceptron")
    with pytest.raises(ConfigurationError, match="overflows"):
        transform(module, symmetries, np.full(9, 400.0))
    other = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with pytest.raises(ConfigurationError, match="another module"):
        transform(other, symmetries, np.ones(9))


def test_statistics_are_known_where_no_gamma_is():
    """The batch normalization is found by its module, not by its parameters."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, eps=1e-60, affine=False), nn.ReLU(), nn.Flatten())
    module = nn.Sequential(*module, nn.Linear(12, 3)).double()
    batch = draw(5, 2, 4, 4)
    module(batch)
    symmetries = scale_symmetries(module, batch)
    assert set(symmetries.batch_norms) == {"1"}
    before = losses(module, batch)
    transform(module, symmetries, combination(symmetries, 1), example_batch=batch)
    assert losses(module, batch) == pytest.approx(before, rel=1e-12)


def test_instance_norms_with_running_statistics_are_moved():
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(3, eps=1e-60, track_running_stats=True)
    module = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    batch = draw(5, 2, 4, 4)
    module(batch)
    symmetries, before = scale_symmetries(module, batch), losses(module, batch)
    transform(module.train(), symmetries, combination(symmetries, 1))
    assert losses(module, batch) == pytest.approx(before, rel=1e-12)


def test_search_leaves_no_hooks():
    module, _ = network("convolutions")
    scale_symmetries(module, draw(5, 2, 4, 4))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
