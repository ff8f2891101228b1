"""Optimizer steps, described before they are taken and compared with exact increments; and an optimizer torch lacks."""

from __future__ import annotations

import pytest
import torch

from lightning_normgeo.geometry import as_rows, norm_increment
from lightning_normgeo.geometry.update_rules.registry import describe_update
from support import reference as ref

UNITS, LRS = 3, [0.2, 0.2, 0.05, 0.1, 0.02]


def set_lr(optimizer, lr):
    """Change the learning rate as schedulers do: a tensor is written in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def take_step(optimizer, parameter, gradient, lr, units=UNITS):
    """Describe the step before taking it; return W, the terms, and the exact increments."""
    set_lr(optimizer, lr)
    parameter.grad = gradient.clone()
    before = parameter.detach().clone()
    rule, state = describe_update(
        optimizer, optimizer.param_groups[0], optimizer.state.get(parameter, {}), parameter.dtype, parameter
    )
    terms = norm_increment(rule, *(as_rows(tensor, units) for tensor in (before, gradient, *state)))
    optimizer.step()
    old, new = as_rows(before, units), as_rows(parameter, units)
    exact = [ref.increment(*map(ref.floats, pair)) for pair in zip(old, new, strict=True)]
    return old, terms, torch.tensor(exact, dtype=torch.float64)


def assert_explains(terms, exact, weight, relative=1e-12):
    """Check that terms explain the increments up to ``relative`` of the terms and the rounding of the stored W⁺."""
    tolerance = relative * sum(term.abs() for term in terms) + 1e-15 * weight.square().sum(1)
    assert ((terms.total - exact).abs() <= tolerance).all()


def assert_terms(terms, expected):
    for name, value, twin in zip(terms._fields, terms, zip(*expected, strict=True), strict=True):
        assert value.tolist() == pytest.approx(list(twin), rel=1e-12, abs=1e-14), name


class Lion(torch.optim.Optimizer):
    """Lion as in lion-pytorch."""

    def __init__(self, parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - lr * group["weight_decay"])
                c = average * beta1 + parameter.grad * (1 - beta1)
                parameter.add_(c.sign(), alpha=-lr)
                average.mul_(beta2).add_(parameter.grad, alpha=1 - beta2)
