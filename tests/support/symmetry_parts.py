"""Small parts of networks for tests of scale symmetries: normalizations, attention, feed-forward layers, blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Make = Callable[[int], nn.Module]


class RMSNorm(nn.Module):
    """Root mean square normalization written by hand, as in many language models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class UnitNorm(nn.Module):
    """Division by the Euclidean norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=self.eps)


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Parallel(nn.Module):
    """x plus several functions of x."""

    def __init__(self, norm: nn.Module, *branches: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        for branch in self.branches:
            x = x + branch(y)
        return x


class Scale(nn.Module):
    """One factor for each channel (LayerScale)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Function(nn.Module):
    """A function without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class GatedMLP(nn.Module):
    """Feed-forward layer with a gate (SwiGLU)."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias), nn.Linear(width, hidden, bias)
        self.down = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def mlp(width: int, hidden: int, function: Callable[[Tensor], Tensor], bias: bool = True) -> nn.Module:
    """Return a feed-forward layer with one hidden layer."""
    return nn.Sequential(nn.Linear(width, hidden, bias), Function(function), nn.Linear(hidden, width, bias))


class Attention(nn.Module):
    """Causal attention.

    Args:
        width: of the stream.
        heads: number of heads of the queries.
        groups: number of heads of keys and values.
        bias: whether the four linear maps have a bias.
        norm: normalization of queries and keys.
        positions: function of queries or keys that adds their positions.
        scores: function of the scores in front of the softmax; None for torch's fused attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        groups: int | None = None,
        bias: bool = True,
        norm: Make | None = None,
        positions: Callable[[Tensor], Tensor] | None = None,
        scores: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.size, groups = width // heads, groups or heads
        self.query, self.output = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.key, self.value = (nn.Linear(width, groups * self.size, bias) for _ in range(2))
        self.norms = nn.ModuleList(norm(self.size) for _ in range(2)) if norm else None
        self.positions, self.scores = positions, scores

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        if self.norms is not None:
            query, key = self.norms[0](query), self.norms[1](key)
        if self.positions is not None:
            query, key = self.positions(query), self.positions(key)
        shared = query.shape[1] // key.shape[1]
        key, value = (z.repeat_interleave(shared, 1) if shared > 1 else z for z in (key, value))
        if self.scores is None:
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            y = self.scores(query @ key.transpose(-2, -1) / math.sqrt(self.size)).softmax(-1) @ value
        return self.output(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)


def causal(scores: Tensor) -> Tensor:
    """Return scores without those of later tokens."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf)


def alibi(scores: Tensor) -> Tensor:
    """Return scores that fall linearly with the distance of tokens (ALiBi)."""
    place = torch.arange(scores.shape[-1], dtype=scores.dtype)
    slopes = 0.5 ** torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype)
    return causal(scores - slopes[:, None, None] * (place[:, None] - place))


def rotary(x: Tensor) -> Tensor:
    """Return queries or keys, of which pairs are rotated by an angle that grows with the position (RoPE)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.7 ** torch.arange(half, dtype=x.dtype)
    cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine


class LanguageModel(nn.Module):
    """Embedding, blocks, final normalization, and a linear map to the tokens.

    Args:
        blocks: the blocks, one behind the other.
        width: of the stream.
        final: normalization in front of the last linear map.
        tied: whether the last linear map uses the table of the embedding.
        positions: number of learned positions.
        tokens: number of different tokens.
    """

    def __init__(
        self,
        *blocks: nn.Module,
        width: int,
        final: nn.Module | None = None,
        tied: bool = False,
        positions: int = 4,
        tokens: int = 5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.ones(positions, width)) if positions else None
        self.blocks, self.final = nn.Sequential(*blocks), final or nn.Identity()
        self.head = nn.Linear(width, tokens, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions
        return self.head(self.final(self.blocks(x)))


def transformer(
    attention: Callable[..., nn.Module] = Attention,
    feed_forward: Callable[[int], nn.Module] | None = None,
    norm: Make = nn.LayerNorm,
    width: int = 4,
    depth: int = 1,
    **options: object,
) -> LanguageModel:
    """Return a language model whose blocks normalize the input of attention and feed-forward layer."""
    feed_forward = feed_forward or partial(mlp, hidden=5, function=F.gelu)
    blocks: list[nn.Module] = []
    for _ in range(depth):
        blocks += [Residual(norm(width), attention(width, 2)), Residual(norm(width), feed_forward(width))]
    return LanguageModel(*blocks, width=width, **{"final": norm(width), **options})  # type: ignore[arg-type]
