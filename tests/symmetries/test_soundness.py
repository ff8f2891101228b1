"""Constructions that tempt a search to claim symmetries that do not exist, and some that it has to find."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo.symmetries import Symmetries, scale_symmetries
from support.symmetry_oracle import elementwise, prepared, products, randomize


class Weights(nn.Module):
    """Parameters by name, and a function of them and an input."""

    def __init__(self, run: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.run = run
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, x: Tensor) -> Any:
        return self.run(x, **dict(self.named_parameters()))


def charged(network: nn.Module, data: Any, draws: int = 8) -> Symmetries:
    """Search, and check that all charges vanish for random parameters and that the generators are independent."""
    prepared(network)
    randomize(network, 0)
    found = scale_symmetries(network, data)
    if not len(found):
        return found
    exponents = elementwise(found, network)
    assert np.linalg.matrix_rank(exponents) == len(found)
    for seed in range(draws):
        randomize(network, seed)
        torch.manual_seed(seed)
        gradients = products(network, data)
        scale = np.abs(exponents).max(1) * np.abs(gradients).sum()
        assert (np.abs(exponents @ gradients) / scale).max() < 1e-10
    return found


class Mul(torch.autograd.Function):
    """Not a product, although its name says so, nor a parameter, although its node has their attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.variable = "x"
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


def _standard(x: Tensor, axis: int = -1) -> Tensor:
    return (x - x.mean(axis, keepdim=True)) / x.std(axis, keepdim=True)


def _capsule(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    square = y.square().sum(-1, keepdim=True)
    return y * square.sqrt() / (1 + square)


def _in_place(x: Tensor, w: Tensor) -> Tensor:
    y = (x @ w).clone()
    y[:, :2] = 1.0
    return F.normalize(y, dim=-1, eps=0)


def _written(x: Tensor, w: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] = (x @ w)[:, 1:]
    return F.normalize(y, dim=-1, eps=0)


def _in_place_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x @ w
    y += b
    y.relu_()
    return F.normalize(y, dim=-1, eps=0)


def _padded(value: float, mode: str = "constant") -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.normalize(F.pad(x @ w, (1, 1), mode, value), dim=-1, eps=0)

    return run


def _masked_norm(fill: float) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = (x @ w + b).masked_fill(torch.tensor([True, False, False, False]), fill)
        return F.layer_norm(y, (4,), eps=0)

    return run


def _masked_scores(fill: float) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        return (x @ w + b).masked_fill(mask, fill).softmax(-1)

    return run


def _chosen_scores(fill: float) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        return torch.where(mask, x @ w + b, fill).softmax(-1)

    return run


def _scaled_shift(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ((x @ w + b) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)).softmax(-1)


def _detached(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y / y.norm(dim=-1, keepdim=True).detach()


def _double_reader(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x @ w + b
    return torch.cat([y.softmax(-1), y.sigmoid()], -1)


def _square(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.normalize(x @ (w @ (w + v)), dim=-1, eps=0)


def _powers(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.normalize((x @ w).abs().pow(3) * (x @ v).abs().pow(-0.5), dim=-1, eps=0)


def _slices_of_stack(x: Tensor, w: Tensor) -> Tensor:
    first, second = w[:2], w[2:]
    return torch.cat([torch.bmm(x.expand(2, -1, -1), part).relu() for part in (first, second)])


def _rounded(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(torch.div(x @ w, 0.5, rounding_mode="floor") + x @ w, dim=-1, eps=0)


def _clamped(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize((x @ w).clamp(-1, 1), dim=-1, eps=0)


def _extrema(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x @ w
    largest, place = y.max(-1, keepdim=True)
    return torch.cat([y / largest, (y + b) / y.amin(-1, keepdim=True), y.gather(1, place) / y.norm()], -1)


def _embedded(padding: int | None) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.normalize(F.embedding((x > 0).long().sum(-1), w, padding), dim=-1, eps=0)

    return run


def _complex(x: Tensor, w: Tensor) -> Tensor:
    turned = torch.view_as_complex((x @ w).unflatten(-1, (2, 2)).contiguous()) * torch.polar(*torch.ones(2, 2).double())
    return F.normalize(torch.view_as_real(turned).flatten(1), dim=-1, eps=0)


def _frozen_linear(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(F.linear(x[:, None], w, torch.ones(4, dtype=x.dtype)), dim=-1, eps=0)


def _shifted_logits(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x @ w + b).masked_fill(torch.tensor([True, False, False, False]), -1e4).log_softmax(-1).clamp_min(-50)


def _cut_shift(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x @ w + b
    return torch.cat([y[:, :2].softmax(-1), y[:, 2:].sigmoid()], -1)


def _viewed_shift(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x @ w + b).unflatten(-1, (2, 2)).softmax(-1)


def _transposed_view(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize((x @ w.T.reshape(4, 4)).T.reshape(-1, 2), dim=-1, eps=0)


def _flat_weight(x: Tensor, w: Tensor) -> Tensor:
    return x @ (w / w.reshape(-1).norm())


def _mixed_constant(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(torch.cat([x @ w, x], -1), dim=-1, eps=0)


def _zero_constant(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(torch.cat([x @ w, torch.zeros_like(x)], -1), dim=-1, eps=0)


MATRIX, VECTOR = (4, 4), (4,)
CASES: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], int]] = {
    "function with a name of torch": (lambda x, w: F.normalize(Mul.apply(x @ w), dim=-1, eps=0), {"w": MATRIX}, 0),
    "capsule": (_capsule, {"w": MATRIX}, 0),
    "norm plus one": (lambda x, w: (x @ w) / (1 + (x @ w).norm(dim=-1, keepdim=True)), {"w": MATRIX}, 0),
    "norm plus ε": (lambda x, w: (x @ w) / (1e-60 + (x @ w).norm(dim=-1, keepdim=True)), {"w": MATRIX}, 1),
    "in place": (_in_place, {"w": MATRIX}, 0),
    "written into a view": (_written, {"w": MATRIX}, 1),
    "in-place sum": (_in_place_sum, {"w": MATRIX, "b": VECTOR}, 1),
    "padding with 0": (_padded(0.0), {"w": MATRIX}, 1),
    "padding with 1": (_padded(1.0), {"w": MATRIX}, 0),
    "padding by copies": (_padded(0.0, "replicate"), {"w": MATRIX}, 1),
    "masked with 0, normalized": (_masked_norm(0.0), {"w": MATRIX, "b": VECTOR}, 1),
    "masked with -1e5, normalized": (_masked_norm(-1e5), {"w": MATRIX, "b": (1,)}, 0),
    "masked with 0, softmax": (_masked_scores(0.0), {"w": MATRIX, "b": (4, 1)}, 0),
    "masked with -1, softmax": (_masked_scores(-1.0), {"w": MATRIX, "b": (4, 1)}, 0),
    "masked with -inf, softmax": (_masked_scores(-math.inf), {"w": MATRIX, "b": (4, 1)}, 4),
    "masked with -1e9, softmax": (_masked_scores(-1e9), {"w": MATRIX, "b": (4, 1)}, 4),
    "where with 0, softmax": (_chosen_scores(0.0), {"w": MATRIX, "b": (4, 1)}, 0),
    "where with -inf, softmax": (_chosen_scores(-math.inf), {"w": MATRIX, "b": (4, 1)}, 4),
    "scaled scores": (_scaled_shift, {"w": MATRIX, "b": (4, 1)}, 0),
    "masked logits": (_shifted_logits, {"w": MATRIX, "b": (4, 1)}, 0),
    "bias of one half of the scores": (_cut_shift, {"w": MATRIX, "b": (4, 1)}, 0),
    "bias of pairs of scores": (_viewed_shift, {"w": MATRIX, "b": (4, 1)}, 4),
    "detached norm": (_detached, {"w": MATRIX}, 0),
    "bias with two readers": (_double_reader, {"w": MATRIX, "b": (4, 1)}, 0),
    "product with itself": (_square, {"w": MATRIX, "v": MATRIX}, 1),
    "square": (lambda x, w: F.normalize(x @ w @ w, dim=-1, eps=0), {"w": MATRIX}, 1),
    "square of a weight alone": (lambda x, w: F.normalize(x @ (w @ w.T), dim=-1, eps=0), {"w": MATRIX}, 1),
    "powers": (_powers, {"w": MATRIX, "v": MATRIX}, 5),
    "slices of a stack": (_slices_of_stack, {"w": (4, 4, 3)}, 0),
    "number of nonzeros": (lambda x, w: x @ w / torch.linalg.vector_norm(x @ w, 0, -1, True), {"w": MATRIX}, 0),
    "rounded": (_rounded, {"w": MATRIX}, 0),
    "clamped": (_clamped, {"w": MATRIX}, 0),
    "extrema": (_extrema, {"w": MATRIX, "b": VECTOR}, 1),
    "embedding": (_embedded(None), {"w": (5, 4)}, 1),
    "embedding with padding": (_embedded(2), {"w": (5, 4)}, 0),
    "complex numbers": (_complex, {"w": MATRIX}, 1),
    "frozen bias": (_frozen_linear, {"w": MATRIX}, 0),
    "transposed view": (_transposed_view, {"w": MATRIX}, 4),
    "norm of the flat weight": (_flat_weight, {"w": MATRIX}, 1),
    "beside a constant": (_mixed_constant, {"w": MATRIX}, 0),
    "beside zeros": (_zero_constant, {"w": MATRIX}, 1),
    "manual standardization": (lambda x, w: _standard(x @ w), {"w": MATRIX}, 1),
    "standardized over samples": (lambda x, w: _standard(x @ w, 0), {"w": MATRIX}, 4),
    "minus a constant": (lambda x, w: F.normalize(x @ w - 1, dim=-1, eps=0), {"w": MATRIX}, 0),
    "one minus": (lambda x, w: F.normalize(1 - x @ w, dim=-1, eps=0), {"w": MATRIX}, 0),
    "fixed scale": (lambda x, w: F.normalize(2 * x @ w / 3, dim=-1, eps=0), {"w": MATRIX}, 1),
    "sum of three": (lambda x, w, v: F.normalize(x @ w + x @ v + x, dim=-1, eps=0), {"w": MATRIX, "v": MATRIX}, 0),
    "addcmul with a constant": (
        lambda x, w, v: F.normalize(torch.addcmul(x, x @ w, x @ v), dim=-1, eps=0), {"w": MATRIX, "v": MATRIX}, 4),
    "einsum of three": (lambda x, w, v: torch.einsum("ni,ij,jk->nk", x, w, v), {"w": MATRIX, "v": MATRIX}, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_charges_vanish(name: str) -> None:
    run, shapes, expected = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(4, 4, dtype=torch.float64)
    assert len(charged(Weights(run, **shapes), x)) == expected


def test_inputs_with_gradient_are_not_scaled() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    found = charged(Weights(lambda x, w, v: (x @ w).relu() @ v, w=MATRIX, v=MATRIX), x)
    assert len(found) == 4
    assert len(charged(Weights(lambda x, w: x @ w, w=MATRIX), x)) == 0


def test_tensors_of_others_are_not_scaled() -> None:
    other = torch.ones(4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 4, dtype=torch.float64)
    assert len(charged(Weights(lambda x, w: (x @ w) * other, w=MATRIX), x)) == 0
