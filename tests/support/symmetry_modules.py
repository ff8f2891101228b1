"""Small networks of other kinds for tests of scale symmetries: experts, recurrence, stacks of weights, constants."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.symmetry_parts import Function


class StackedExperts(nn.Module):
    """Experts whose weights are stacked in one tensor, mixed by a softmax."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.first = nn.Parameter(torch.ones(experts, width, hidden))
        self.second = nn.Parameter(torch.ones(experts, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.expand(len(self.first), -1, -1), self.first).relu()
        return torch.einsum("ebi,be->bi", torch.bmm(hidden, self.second), self.router(x).softmax(-1))


class ListedExperts(nn.Module):
    """A list of experts, each of which is applied to the tokens that a router sends to it."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(1, -1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen[:, 0] == number).nonzero()[:, 0]
            result = result.index_add(0, rows, expert(x[rows]) * weights[rows])
        return result


class GatedCell(nn.Module):
    """A GRU cell applied to the steps of a sequence."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(width, hidden), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.cell.hidden_size)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class HeadsByEinsum(nn.Module):
    """Attention with weights of three axes: head, width of the stream, width of the head."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Parameter(torch.ones(heads, width, size)) for _ in range(3))
        self.output = nn.Parameter(torch.ones(heads, size, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = (torch.einsum("btd,hdk->bhtk", y, w) for w in (self.query, self.key, self.value))
        weights = torch.einsum("bhtk,bhsk->bhts", query, key).softmax(-1)
        return x + torch.einsum("bhts,bhsk,hkd->btd", weights, value, self.output)


class InputsFirst(nn.Module):
    """Linear maps to heads and back, with weights of three axes: width of the stream, head, width of the head."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.ones(width, heads, size))
        self.outward = nn.Parameter(torch.ones(heads, size, width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btd,dhk->bthk", x, self.inward).relu()
        return torch.einsum("bthk,hkd->btd", hidden, self.outward)


class AttentionWithDropout(nn.Module):
    """Attention whose weights are dropped at random, by torch's function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), dropout_p=0.2)


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence with itself, behind a normalization."""

    def __init__(self, width: int, **options: object) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class TwoOutputs(nn.Module):
    """A trunk with two heads, the outputs of which are given in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"class": self.first(x), "box": self.second(x)}


class Detached(nn.Module):
    """x divided by its norm, which counts as a constant."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return self.head(y / y.norm(dim=-1, keepdim=True).detach())


def chain(*widths: int, function: Callable[[Tensor], Tensor] = torch.relu, norm: bool = False) -> nn.Sequential:
    """Return linear layers with a function between, and optionally a batch normalization behind the first one."""
    layers: list[nn.Module] = []
    for k, (inputs, outputs) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(inputs, outputs))
        if norm and k == 0:
            layers.append(nn.BatchNorm1d(outputs))
        if k < len(widths) - 2:
            layers.append(Function(function))
    return nn.Sequential(*layers)


def frozen(network: nn.Module, *names: str) -> nn.Module:
    """Return a network some parameters of which are not trained, given by their names or parts of them."""
    for name, parameter in network.named_parameters():
        if any(part in name for part in names):
            parameter.requires_grad_(False)
    return network


def scale_of_last(outputs: Tensor) -> Tensor:
    """Return a loss that depends on the direction of the outputs only."""
    return (F.normalize(outputs, dim=-1, eps=1e-60) * torch.randn_like(outputs)).sum()


class Learned(nn.Module):
    """Weight normalization written by hand, and a table of weights that is cut, flipped, rolled and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.length = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))
        self.table = nn.Parameter(torch.ones(4, 4))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ (self.first / self.first.norm(dim=1, keepdim=True) * self.length[:, None]).T
        upper, lower = self.table.roll(1, 0).split(2)
        return self.last((x.relu() @ torch.cat([lower, upper.flip(1)]).T).relu())
