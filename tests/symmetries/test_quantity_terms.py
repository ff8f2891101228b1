"""The increments of conserved quantities are explained over steps of an optimizer."""

import numpy as np
import pytest
import torch

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry import charge, conserved_quantity, imbalance, normalized_charge
from lightning_normgeo.symmetries import quantity_terms
from support.symmetric_networks import loss_of, symmetric

STEPS = 20
NAMES = ["perceptron with batch norm", "pre-activation", "gpt with relu", "llama with shared keys", "mixed"]
OPTIMIZERS = {
    "sgd": (lambda ps: [torch.optim.SGD(ps, lr=0.05)]),
    "momentum": (lambda ps: [torch.optim.SGD(ps, lr=0.01, momentum=0.9, dampening=0.2)]),
    "nesterov with decay": (lambda ps: [torch.optim.SGD(ps, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01)]),
    "adamw": (lambda ps: [torch.optim.AdamW(ps, lr=0.01)]),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda ps: [
        torch.optim.Muon([p for p in ps if p.ndim == 2], lr=0.01),
        torch.optim.SGD([p for p in ps if p.ndim != 2], lr=0.01),
    ]


def squares(module):
    return {name: p.detach().square() for name, p in module.named_parameters()}


def steps(name, kind):
    """Yield for each step the symmetries, terms, measured increments, and Σ|s|‖W‖²."""
    module, batch, symmetries = symmetric(name)
    optimizers = OPTIMIZERS[kind](list(module.parameters()))
    for _ in range(STEPS):
        module.zero_grad()
        loss_of(module, batch).backward()
        terms, before = quantity_terms(symmetries, module, *optimizers), squares(module)
        for optimizer in optimizers:
            optimizer.step()
        after = squares(module)
        measured = symmetries.sums({key: after[key] - before[key] for key in after})
        yield (
            symmetries,
            terms,
            torch.from_numpy(measured),
            torch.from_numpy(abs(symmetries.exponents) @ symmetries.slice_sums(before)),
        )


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_increments_are_explained(name, kind):
    for _, terms, measured, size in steps(name, kind):
        assert ((terms.total - measured).abs() <= 1e-12 * size).all()


@pytest.mark.parametrize("kind", ["sgd", "momentum", "nesterov with decay"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_has_no_part_under_sgd(name, kind):
    """Without it the other terms explain everything: the charges are zero."""
    for _, terms, measured, size in steps(name, kind):
        assert (terms.gradient.abs() <= 1e-12 * size).all()
        if kind == "sgd":
            assert ((terms.quadratic - measured).abs() <= 1e-12 * size).all()


OTHERS = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.01, amsgrad=True),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.01),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=0.01),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=0.1),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.01),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "lion": lambda ps: timm_optimizer("lion.Lion")(ps, lr=0.01),
    "lamb": lambda ps: timm_optimizer("lamb.Lamb")(ps, lr=0.01),
    "lars": lambda ps: timm_optimizer("lars.Lars")(ps, lr=0.01, momentum=0.9),
    "cautious adamw": lambda ps: timm_optimizer("adamw.AdamWLegacy")(ps, lr=0.01, caution=True),
}


def timm_optimizer(name):
    module, _, kind = name.partition(".")
    return getattr(pytest.importorskip(f"timm.optim.{module}"), kind)


@pytest.mark.parametrize("kind", OTHERS)
def test_increments_of_other_optimizers_are_explained(kind, monkeypatch):
    """Slices run along all axes here, and rules that read whole tensors are among them."""
    monkeypatch.setitem(OPTIMIZERS, kind, lambda ps: [OTHERS[kind](ps)])
    for k, (_, terms, measured, size) in enumerate(steps("vision transformer", kind)):
        assert ((terms.total - measured).abs() <= 1e-12 * size).all(), k


def test_adamw_does_not_conserve():
    largest = max(
        float(terms.gradient.abs().max() / terms.quadratic.abs().max())
        for _, terms, _, _ in steps("gpt with relu", "adamw")
    )
    assert largest > 1


def test_invariant_blocks_only_grow_under_sgd():
    for symmetries, terms, _, _ in steps("pre-activation", "sgd"):
        joint = symmetries.in_role("invariant jointly")
        assert len(joint) > 0
        assert (terms.quadratic[joint] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_charges_of_the_geometry_are_those_of_the_symmetries(name):
    module, batch, symmetries = symmetric(name)
    loss_of(module, batch).backward()
    named = dict(module.named_parameters())
    inner, weight_sq, gradient_sq = (
        torch.from_numpy(symmetries.slice_sums({key: f(p.detach(), p.grad) for key, p in named.items()}))
        for f in (lambda w, g: w * g, lambda w, g: w * w, lambda w, g: g * g)
    )
    matrix = symmetries.matrix
    assert matrix.is_sparse
    assert np.allclose(charge(matrix, inner), symmetries.charges(named), rtol=0, atol=1e-15)
    cosines = normalized_charge(matrix, inner, weight_sq, gradient_sq)
    cosines[symmetries.in_role("without effect")] = 0  # their gradients are rounding
    assert cosines.abs().max() < 1e-12
    exact = torch.from_numpy(symmetries.exponents.toarray())
    assert torch.allclose(conserved_quantity(matrix, weight_sq), exact @ weight_sq, rtol=1e-13)
    assert torch.allclose(imbalance(matrix, weight_sq), imbalance(exact, weight_sq), rtol=1e-12)


def test_rows_of_slices_have_their_sums():
    module, _, symmetries = symmetric("mixed")
    named = {name: p.detach() for name, p in module.named_parameters()}
    sums = symmetries.slice_sums(named)
    for own in symmetries.slices:
        assert np.allclose(own.rows(named[own.parameter]).sum(1), sums[own.start : own.stop])


def test_parameters_without_gradient_do_not_move():
    module, batch, symmetries = symmetric("relu perceptron")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.1)
    assert quantity_terms(symmetries, module, optimizer).total.tolist() == [0.0] * 9
    loss_of(module, batch).backward()
    assert quantity_terms(symmetries, module).total.tolist() == [0.0] * 9
    with pytest.raises(ConfigurationError, match="no known update rule"):
        quantity_terms(symmetries, module, torch.optim.LBFGS(module.parameters()))
