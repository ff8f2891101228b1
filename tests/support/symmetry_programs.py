"""Random programs: compositions of operations on tensors of shape (4, 4, 4), with parameters of several shapes.

All axes have the same length, so that a rule that confuses them does not fail but gives a wrong answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 4
PARAMETER_SHAPES = ((4, 4), (4,), (4, 1), (1, 4), (4, 1, 1), (4, 4, 4), (1, 4, 4), (4, 1, 4), (1,), ())
FILLS = (0.0, -1e9, -1.0, 2.0)


@dataclass(frozen=True)
class Step:
    """One operation of a program.

    Attributes:
        name: the operation.
        sources: numbers of the tensors that it reads, counted back from the newest one.
        choice: a number that selects among variants, such as an axis.
        shared: whether it uses the parameters of the previous step of the same kind.
        frozen: whether its parameters are not trained.
    """

    name: str
    sources: tuple[int, int]
    choice: int
    shared: bool = False
    frozen: bool = False


@dataclass
class Scope:
    """What an operation sees: its inputs, its choice, and a way to get parameters."""

    a: Tensor
    b: Tensor
    choice: int
    parameter: Callable[..., Tensor] = field(repr=False)

    @property
    def axis(self) -> int:
        return self.choice % 3

    @property
    def mask(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.choice)
        shape = [SIZE, SIZE, SIZE]
        shape[(self.choice // 3) % 3] = 1
        mask = torch.rand(shape, generator=generator) < 0.4
        mask.select(self.axis, 0).fill_(False)
        return mask

    @property
    def order(self) -> Tensor:
        return torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.choice))


def _reshaped(s: Scope) -> Tensor:
    shapes = ((2, 8, 4), (16, 4), (4, 2, 2, 4), (8, 8), (2, 2, 4, 4), (4, 16), (4, 4, 2, 2))
    x = s.a.reshape(shapes[s.choice % len(shapes)])
    return x.transpose(s.choice % x.ndim, (s.choice // 2 + 1) % x.ndim).reshape(SIZE, SIZE, SIZE)


def _convolution(s: Scope) -> Tensor:
    groups, kernel = (1, 2, 4)[s.choice % 3], (1, 3)[s.choice // 3 % 2]
    weight = s.parameter((4, 4 // groups, kernel))
    bias = s.parameter((4,), 1) if s.choice // 6 % 2 else None
    if s.choice // 12 % 2:
        return F.conv_transpose1d(s.a, weight, bias, padding=kernel // 2, groups=groups)
    return F.conv1d(s.a, weight, bias, padding=kernel // 2, groups=groups)


class DegenerateError(Exception):
    """Raised if a normalization divides by a deviation of zero, where rounding errors decide."""


def _alive(x: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    if not bool((x.detach().var(axes) > 1e-12).all()):
        raise DegenerateError
    return x


def _layer_norm(s: Scope) -> Tensor:
    shape = ((4,), (4, 4))[s.choice % 2]
    gamma = s.parameter(shape) if s.choice // 2 % 2 else None
    beta = s.parameter(shape, 1) if s.choice // 4 % 2 else None
    return F.layer_norm(_alive(s.a, (-1, -2)[: len(shape)]), shape, gamma, beta, eps=0)


def _channel_norm(s: Scope) -> Tensor:
    gamma, beta = (s.parameter((4,), k) if s.choice // 2**k % 2 else None for k in range(2))
    kind = s.choice // 4 % 5
    if kind < 2:
        mean, variance = torch.zeros(4, dtype=s.a.dtype), torch.ones(4, dtype=s.a.dtype)
        return F.batch_norm(_alive(s.a, (0, 2)), mean, variance, gamma, beta, training=kind == 0, eps=1e-60)
    if kind == 2:
        return F.instance_norm(_alive(s.a, 2), weight=gamma, bias=beta, eps=0)
    return F.group_norm(_alive(s.a, 2), (1, 2)[kind - 3], gamma, beta, eps=0)


def _masked_softmax(s: Scope) -> Tensor:
    if s.choice % 2:
        return s.a.masked_fill(s.mask, -math.inf).softmax(s.axis)
    return torch.where(s.mask, -math.inf, s.a).softmax(s.axis)


def _quotient(s: Scope) -> Tensor:
    norms = (
        lambda x: x.norm(dim=s.axis, keepdim=True),
        lambda x: x.square().mean(s.axis, keepdim=True).sqrt(),
        lambda x: x.std(s.axis, keepdim=True),
        lambda x: x.abs().amax(s.axis, keepdim=True),
        lambda x: (x.var(s.axis, keepdim=True) + 1.0).sqrt(),
        lambda x: 1.0 + x.norm(dim=s.axis, keepdim=True),
        lambda x: (x.square().sum(s.axis, keepdim=True) + 1e-60).sqrt(),
        lambda x: x.norm(dim=s.axis, keepdim=True).detach(),
        lambda x: x.abs().sum(),
    )
    return s.a / norms[s.choice % len(norms)](s.b)


def _in_place(s: Scope) -> Tensor:
    y = s.a * 1.0
    kind = s.choice % 5
    if kind == 0:
        y += s.b
    elif kind == 1:
        y.relu_()
    elif kind == 2:
        y[:, :2] = s.b[:, 2:]
    elif kind == 3:
        y[:, torch.tensor([0, 2])] = s.b[:, 1:3]
    else:
        y[s.choice % 4] = float(s.choice % 2)
    return y


def _scattered(s: Scope) -> Tensor:
    index = s.order[:2] if s.choice % 2 else torch.tensor([1, 1])
    base = (torch.zeros_like(s.a), torch.ones_like(s.a), s.a)[s.choice % 3]
    part = s.b.index_select(s.axis, s.order[:2])
    return base.index_add(s.axis, index, part) if s.choice // 2 % 2 else base.index_copy(s.axis, s.order[2:], part)


def _picked(s: Scope) -> Tensor:
    places = s.order.view(*(-1 if k == s.axis else 1 for k in range(3))).expand(4, 4, 4)
    shuffled = places.gather((s.axis + 1) % 3, places)
    return s.a.gather(s.axis, shuffled)


def _joined(s: Scope) -> Tensor:
    start = s.choice // 3 % 4
    return torch.cat([s.a, s.b], s.axis).narrow(s.axis, start, 4)


def _padded(s: Scope) -> Tensor:
    widths = [0] * 6
    widths[2 * s.axis] = 1
    return F.pad(s.a, widths, value=FILLS[s.choice // 3 % 4]).narrow(2 - s.axis, s.choice // 12 % 2, 4)


def _attention(s: Scope) -> Tensor:
    query, key, value = s.a, s.b, s.a if s.choice % 2 else s.b
    if s.choice // 2 % 2:
        query, key, value = (z.unflatten(-1, (2, 2)).transpose(1, 2) for z in (query, key, value))
    y = F.scaled_dot_product_attention(query, key, value, is_causal=bool(s.choice // 4 % 2))
    return y if y.ndim == 3 else y.transpose(1, 2).flatten(2)


def _einsum(s: Scope) -> Tensor:
    rules = ("abc,acd->abd", "abc,abd->acd", "abc,abc->ab", "abc,cde->abd", "abc,dbc->ad", "abc,adc->bd")
    y = torch.einsum(rules[s.choice % len(rules)], s.a, s.b)
    return y if y.ndim == 3 else y.unsqueeze(s.axis).expand(4, 4, 4)


def _power(s: Scope) -> Tensor:
    exponent = (2, 3, 0.5, -1)[s.choice % 4]
    return s.a.pow(exponent) if exponent in (2, 3) else (s.a.abs() + (s.choice // 4 % 2)).pow(exponent)


def _shape(s: Scope) -> tuple[int, ...]:
    return PARAMETER_SHAPES[s.choice % len(PARAMETER_SHAPES)]


FUNCTIONS = (torch.relu, torch.abs, F.gelu, torch.tanh, lambda x: F.leaky_relu(x, 0.2), lambda x: x.clamp(min=0))
CHANGES = (
    lambda x, k: x.transpose(k, (k + 1) % 3),
    lambda x, k: x.flip(k),
    lambda x, k: x.roll(1, k),
    lambda x, k: x.cumsum(k),
    lambda x, k: x.sort(k)[0],
    lambda x, k: x.mean(k, keepdim=True).expand(4, 4, 4),
    lambda x, k: x - x.mean(k, keepdim=True),
    lambda x, k: torch.stack(x.unbind(k)[::-1], k),
    lambda x, k: x.narrow(k, 1, 2).repeat(*(2 if axis == k else 1 for axis in range(3))),
    lambda x, k: x.amax(k, keepdim=True) - x,
    lambda x, k: torch.cat(x.chunk(2, k)[::-1], k),
    lambda x, k: x.clamp(-1, 1),
    lambda x, k: x.detach() + x,
    lambda x, k: x + (k - 1.0),
    lambda x, k: x * (k - 1.5),
)

OPERATIONS: dict[str, Callable[[Scope], Tensor]] = {
    "linear": lambda s: F.linear(s.a, s.parameter((4, 4)), s.parameter((4,), 1) if s.choice % 2 else None),
    "parameter times": lambda s: s.a * s.parameter(_shape(s)),
    "parameter plus": lambda s: s.a + s.parameter(_shape(s)),
    "parameter products": lambda s: s.a @ s.parameter((4, 4, 4)),
    "products of parameters": lambda s: s.a @ (s.parameter((4, 4)) @ s.parameter((4, 4), s.choice % 2)),
    "normalized parameter": lambda s: s.a @ F.normalize(s.parameter((4, 4)), dim=s.choice % 2, eps=0),
    "convolution": _convolution,
    "function": lambda s: FUNCTIONS[s.choice % len(FUNCTIONS)](s.a),
    "change": lambda s: CHANGES[s.choice // 3 % len(CHANGES)](s.a, s.axis),
    "power": _power,
    "layer norm": _layer_norm,
    "channel norm": _channel_norm,
    "softmax": lambda s: s.a.softmax(s.axis),
    "masked softmax": _masked_softmax,
    "normalize": lambda s: F.normalize(s.a, dim=s.axis, eps=0),
    "sum": lambda s: s.a + s.b,
    "difference": lambda s: s.a - s.b,
    "product": lambda s: s.a * s.b,
    "quotient": _quotient,
    "matrix product": lambda s: s.a @ (s.b.mT if s.choice % 2 else s.b),
    "einsum": _einsum,
    "attention": _attention,
    "masked": lambda s: s.a.masked_fill(s.mask, FILLS[s.choice % 4]),
    "where": lambda s: torch.where(s.mask, s.a, s.b if s.choice % 2 else FILLS[s.choice // 2 % 4]),
    "maximum": lambda s: torch.maximum(s.a, s.b if s.choice % 2 else torch.zeros_like(s.a) + s.choice // 2 % 2),
    "reshaped": _reshaped,
    "joined": _joined,
    "padded": _padded,
    "in place": _in_place,
    "scattered": _scattered,
    "picked": _picked,
}


class Program(nn.Module):
    """A module that runs steps one after the other; the newest tensors are its outputs.

    Args:
        steps: the operations.
        outputs: number of outputs.
    """

    def __init__(self, steps: Sequence[Step], outputs: int = 1) -> None:
        super().__init__()
        self.steps, self.outputs = tuple(steps), outputs
        self.owners: dict[str, str] = {}

    def forward(self, x: Tensor) -> list[Tensor]:
        tensors = [x]
        for number, step in enumerate(self.steps):
            a, b = (tensors[-1 - source % len(tensors)] for source in step.sources)
            scope = Scope(a, b, step.choice, lambda shape, part=0, k=number, s=step: self._parameter(k, s, shape, part))
            tensors.append(OPERATIONS[step.name](scope))
        return tensors[-self.outputs :]

    def _parameter(self, number: int, step: Step, shape: tuple[int, ...], part: int) -> Tensor:
        kind = f"{'x'.join(map(str, shape))}_{part}"
        name = self.owners.get(kind) if step.shared else None
        name = name or f"step{number}_{kind}"
        if not hasattr(self, name):
            self.register_parameter(name, nn.Parameter(torch.randn(shape).double(), not step.frozen))
        self.owners[kind] = name
        return getattr(self, name)
