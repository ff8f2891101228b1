"""Real optimizers by test name, and steps of several weights read as the monitors read them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import lion_pytorch
import pytorch_optimizer
import timm.optim
import torch
from timm.optim.adamw import AdamWLegacy
from timm.optim.mars import Mars
from timm.optim.nadamw import NAdamW
from torch import nn

from lightning_normgeo.geometry import as_rows, measured_increment, storage_floor, systematic_floor, update_products
from lightning_normgeo.geometry.products.one_pass import many_weight_products
from lightning_normgeo.probes.explain import by_rule, explain, plan
from support import reference as ref
from support.tensors import draw

DECAY = {"weight_decay": 0.1}
EXPLAINED = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True, **DECAY),
    "Adam": partial(torch.optim.Adam, amsgrad=True, **DECAY),
    "AdamW": partial(torch.optim.AdamW, **DECAY),
    "NAdam": partial(torch.optim.NAdam, decoupled_weight_decay=True, **DECAY),
    "RAdam": partial(torch.optim.RAdam, betas=(0.9, 0.9), **DECAY),
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.9, centered=True, **DECAY),
    "Adagrad": partial(torch.optim.Adagrad, lr_decay=0.1, initial_accumulator_value=0.3, **DECAY),
    "Adamax": partial(torch.optim.Adamax, **DECAY),
    "Adadelta": partial(torch.optim.Adadelta, **DECAY),
    "Rprop": torch.optim.Rprop,
    "ASGD": partial(torch.optim.ASGD, lambd=0.01, t0=2, **DECAY),
    "Adafactor": partial(torch.optim.Adafactor, **DECAY),
    "lion-pytorch": partial(lion_pytorch.Lion, **DECAY),
    "lion-pytorch decoupled": partial(lion_pytorch.Lion, decoupled_weight_decay=True, **DECAY),
    "timm Lion": partial(timm.optim.Lion, **DECAY),
    "timm Lion cautious": partial(timm.optim.Lion, caution=True, corrected_weight_decay=True, **DECAY),
    "timm AdamW": partial(AdamWLegacy, amsgrad=True, **DECAY),
    "timm AdamW cautious": partial(AdamWLegacy, caution=True, corrected_weight_decay=True, **DECAY),
    "timm NAdamW": partial(NAdamW, **DECAY),
    "timm NAdamW cautious": partial(NAdamW, caution=True, corrected_weight_decay=True, **DECAY),
    "timm SGDW": partial(timm.optim.SGDW, momentum=0.9, dampening=0.2, **DECAY),
    "timm SGDW cautious": partial(
        timm.optim.SGDW, momentum=0.9, nesterov=True, caution=True, corrected_weight_decay=True, **DECAY
    ),
    "timm Adopt": partial(timm.optim.Adopt, **DECAY),
    "timm Adopt cautious": partial(
        timm.optim.Adopt, decoupled=True, caution=True, corrected_weight_decay=True, clip_exp=None, **DECAY
    ),
    "timm LaProp": partial(timm.optim.LaProp, **DECAY),
    "timm LaProp cautious": partial(timm.optim.LaProp, caution=True, corrected_weight_decay=True, **DECAY),
    "timm AdamP": partial(timm.optim.AdamP, delta=0.5, **DECAY),
    "timm AdamP cautious": partial(timm.optim.AdamP, delta=0.5, nesterov=True, caution=True, **DECAY),
    "timm SGDP": partial(timm.optim.SGDP, momentum=0.9, delta=0.5, **DECAY),
    "timm SGDP cautious": partial(timm.optim.SGDP, momentum=0.9, nesterov=True, caution=True, delta=1.5, **DECAY),
    "timm LARS": partial(timm.optim.Lars, momentum=0.9, dampening=0.3, **DECAY),
    "timm LARC": partial(timm.optim.Lars, momentum=0.9, nesterov=True, trust_clip=True, always_adapt=True),
    "timm LAMB": partial(timm.optim.Lamb, **DECAY),
    "timm LAMB cautious": partial(
        timm.optim.Lamb, decoupled_decay=True, caution=True, corrected_weight_decay=True, trust_clip=True, **DECAY
    ),
    "timm LAMB plain": partial(timm.optim.Lamb, bias_correction=False, grad_averaging=False, max_grad_norm=None),
    "timm LAMB foreach": partial(timm.optim.Lamb, foreach=True, always_adapt=True, **DECAY),
    "timm MARS": partial(Mars, **DECAY),
    "timm MARS cautious": partial(Mars, caution=True, lr_1d_factor=0.5, **DECAY),
    "timm MARS lion": partial(Mars, mars_type="lion", caution=True, optimize_1d=True, **DECAY),
    "pytorch-optimizer Lion": partial(pytorch_optimizer.Lion, **DECAY),
    "pytorch-optimizer Lion coupled": partial(pytorch_optimizer.Lion, weight_decouple=False, **DECAY),
    "pytorch-optimizer Lion cautious": partial(pytorch_optimizer.Lion, cautious=True, **DECAY),
    "pytorch-optimizer AdEMAMix": partial(pytorch_optimizer.AdEMAMix, weight_decouple=True, **DECAY),
    "pytorch-optimizer AdEMAMix coupled": partial(pytorch_optimizer.AdEMAMix, t_alpha_beta3=5, foreach=False, **DECAY),
}
MATRICES_ONLY = {"Muon": partial(torch.optim.Muon, **DECAY)} if hasattr(torch.optim, "Muon") else {}


class Steps(SimpleNamespace):
    """The formula's terms and the measured increments for one step of several weights; one value per unit."""


def network(*shapes, dtype=torch.float64, seed=0):
    return [nn.Parameter(draw(*shape, seed=seed + 50 * k).to(dtype)) for k, shape in enumerate(shapes)]


def rows(tensor):
    return as_rows(tensor, tensor.shape[0] if tensor.ndim > 1 else 1)


def set_gradients(parameters, seed, scale=1.0):
    for k, parameter in enumerate(parameters):
        gradient = scale * draw(*parameter.shape, seed=seed + 100 * k + 7)
        parameter.grad = gradient.to(parameter.dtype)


def read(optimizer):
    """Return plans and products of all weights with gradients, before a step."""
    moving = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    plans = [plan(parameter, rows, optimizer, group) for parameter, group in moving]
    return [parameter for parameter, _ in moving], plans, many_weight_products([one.reads for one in plans])


def take_steps(optimizer, step=None):
    """Take a step; return the terms (None if unexplained), exact increments and old value of each weight."""
    parameters, plans, products = read(optimizer)
    before = [rows(parameter.detach().clone()) for parameter in parameters]
    terms = [None] * len(plans)
    for members in by_rule(plans):
        explained = explain([plans[k] for k in members], [products[k] for k in members]).terms
        if explained is not None:
            lengths = [len(products[k].weight_sq) for k in members]
            columns = zip(*(term.split(lengths) for term in explained), strict=True)
            for k, column in zip(members, columns, strict=True):
                terms[k] = type(explained)(*column)
    (step or optimizer.step)()
    exact = [increments(*pair) for pair in zip(before, map(rows, parameters), strict=True)]
    return [
        Steps(terms=one, exact=increment, weight=weight, rule=planned.reads.rule)
        for one, increment, weight, planned in zip(terms, exact, before, plans, strict=True)
    ]


def increments(before, after):
    """Return the exact change of ‖W‖²; for large float32 tensors to the precision of float64."""
    if before.dtype == torch.float64:
        pairs = zip(before, after, strict=True)
        return torch.tensor([ref.increment(*map(ref.floats, pair)) for pair in pairs], dtype=torch.float64)
    products = update_products(before, after)
    return measured_increment(products.weight_update, products.update_sq)


def residual(step):
    """Return the largest residual of a step, relative to its terms and the rounding of stored values."""
    size = sum(term.abs() for term in step.terms) + 1e-3 * step.weight.double().square().sum(1)
    return ((step.terms.total - step.exact).abs() / size).max().item()


def over_floors(step):
    """Return the largest residual of a step relative to the floors, as monitors show it: summed over all units."""
    dtype = step.weight.dtype
    weight_sq, quartic = step.weight.double().square().sum(1), step.weight.double().pow(4).sum()
    floor = storage_floor(quartic, dtype, step.rule.stores) + systematic_floor(step.terms, weight_sq, dtype).sum()
    return ((step.terms.total - step.exact).sum().abs() / floor).item()
