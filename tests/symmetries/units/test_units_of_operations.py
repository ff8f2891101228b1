"""Units behind single operations: found exactly where scaling a unit leaves the loss unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo.geometry import weight_gradient_cosine
from lightning_normgeo.symmetries import WeightUnits, scale_invariant_units, units_from_graph

EPS = 1e-60
Apply = Callable[[Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """One weight, and a function of the batch and it."""

    def __init__(self, weight: tuple[int, ...], function: Apply) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(sum(weight))
        self.weight = nn.Parameter(torch.randn(weight, generator=generator, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@dataclass
class Case:
    """A function of the batch ``x`` and the weight ``w``, and the units expected for ``w``.

    Attributes:
        function: of x and w.
        kind: the expected kind.
        count: the expected number of units; of rows for ``none``.
        needs_trace: whether the graph alone does not show it: the kind is ``none`` there.
        weight: shape of the weight.
    """

    function: Apply
    kind: str
    count: int
    needs_trace: bool = False
    weight: tuple[int, ...] = (6, 4, 3, 3)


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w)


def bn(y: Tensor) -> Tensor:
    return F.batch_norm(y, None, None, training=True, eps=EPS)


def ln(y: Tensor) -> Tensor:
    return F.layer_norm(y, y.shape[-1:], eps=EPS)


def gn(y: Tensor, groups: int = 3) -> Tensor:
    return F.group_norm(y, groups, eps=EPS)


def normed(function: Callable[[Tensor], Tensor]) -> Apply:
    """An operation between a convolution and a batch normalization."""
    return lambda x, w: bn(function(conv(x, w)))


def grouped(function: Callable[[Tensor], Tensor]) -> Apply:
    return lambda x, w: gn(function(conv(x, w)))


def linear(function: Callable[[Tensor], Tensor]) -> Apply:
    """An operation between a linear layer on tokens (N, T, 6) and a layer normalization."""
    return lambda x, w: ln(function(x.flatten(2).transpose(1, 2) @ w.t()))


def heads(formula: str, last: Callable[[Tensor], Tensor]) -> Apply:
    return lambda x, w: last(torch.einsum(formula, x.flatten(2).transpose(1, 2), w)).sigmoid()


def tokens(x: Tensor) -> Tensor:
    """Return word indices (N, T) computed from a batch of images."""
    return (x.flatten(1)[:, :8] * 3).long().abs() % 9


def bags(x: Tensor, w: Tensor) -> Tensor:
    """Return means of embedded words (N, channels, 1)."""
    return F.embedding_bag(tokens(x), w)[..., None]


GRID = F.affine_grid(torch.tensor([[[0.9, 0.2, 0.1], [-0.2, 0.8, 0.0]]]).double(), [1, 1, 2, 2], align_corners=False)
PICK = torch.tensor([3, 0, 0, 4, 1])
NODES = torch.tensor([0, 2, 1, 1, 5, 2, 0])
IMAGE, MATRIX = (6, 4, 3, 3), (6, 4)


def zeros(y: Tensor, size: int = 6) -> Tensor:
    return y.new_zeros((size, *y.shape[1:]))


def everywhere(y: Tensor) -> Tensor:
    """Return the index of a scatter along the batch."""
    return NODES.view(-1, 1, 1, 1).expand_as(y)


def along(y: Tensor, dim: int) -> Tensor:
    """Return the index of every entry along an axis."""
    return torch.arange(y.shape[dim]).view([-1 if d == dim else 1 for d in range(y.ndim)]).expand_as(y)


def channel_sums(y: Tensor) -> Tensor:
    return torch.zeros(7, 3, 2, 2).to(y).scatter_add(1, along(y, 1) % 3, y)


def over_zeros(y: Tensor) -> Tensor:
    out = zeros(y, 9)
    out[NODES.unique()] = y[:4]
    return out


def masked(y: Tensor) -> Tensor:
    y = y * 1
    y[y < 0] = 0
    return y


def channels_last_pool(y: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(y.contiguous(memory_format=torch.channels_last), 1)


def token(y: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(y), 1, y.shape[2], dtype=y.dtype), y], 1)


def class_head(x: Tensor, w: Tensor) -> Tensor:
    """NormFace: cosines of features and class weights."""
    return F.linear(F.normalize(x.flatten(1)[:, :4]), F.normalize(w)).mul(9).exp()


def class_columns(x: Tensor, w: Tensor) -> Tensor:
    return (F.normalize(x.flatten(1)[:, :6]) @ F.normalize(w, dim=0)).mul(9).exp()


def arcface(x: Tensor, w: Tensor) -> Tensor:
    cosine = F.linear(F.normalize(x.flatten(1)[:, :4]), F.normalize(w))
    sine = (1.0 - cosine.square()).clamp(0, 1).sqrt()
    return torch.where(cosine > 0.2, 0.8 * cosine - 0.5 * sine, cosine - 0.3).mul(4).exp()


def pow_norm(x: Tensor, w: Tensor) -> Tensor:
    y = x.flatten(1)[:, :4] @ w.t()
    return y * (y.square().mean(-1, keepdim=True) + EPS).pow(-0.5)


def star_norm(x: Tensor, w: Tensor) -> Tensor:
    y = x.flatten(1)[:, :4] @ w.t()
    return y * y.square().mean(-1, keepdim=True) ** -0.5


def bilinear(x: Tensor, w: Tensor) -> Tensor:
    """Both factors of a product depend on the weight: degree 2, with no division by the same degree."""
    y = x.flatten(1)[:, :4] @ w.t()
    return y / torch.dot(y[0], y[1]).abs()


def matrix_vector(x: Tensor, w: Tensor) -> Tensor:
    return torch.mv(w.t() @ w, w[0]) / w.norm()


def sparse(x: Tensor, w: Tensor) -> Tensor:
    graph = (torch.arange(49).view(7, 7) % 3 == 0).to(x).to_sparse()
    return bn(torch.sparse.mm(graph, x.flatten(1)[:, :4] @ w.t()))


def values(x: Tensor, w: Tensor) -> Tensor:
    """An attention with a normalization behind it (EVA-02)."""
    x = x.flatten(2).transpose(1, 2)
    v = (x @ w.t()).unflatten(-1, (2, 3)).transpose(1, 2)
    q = x[..., :3].unsqueeze(1).expand_as(v)
    return ln(F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2))


def queries_and_values(x: Tensor, w: Tensor) -> Tensor:
    y = x.flatten(2).transpose(1, 2) @ w.t()
    return ln(F.scaled_dot_product_attention(y, x.flatten(2).transpose(1, 2)[..., [0, 1, 2, 3, 0, 1]], y))


def two_orders(x: Tensor, w: Tensor) -> Tensor:
    """Return tokens at permuted positions, combined after both lists were flattened to one axis."""
    e, order = F.embedding(tokens(x), w), torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    return ln(e.index_select(1, order).view(-1, 5) + e.index_select(1, order.flip(0)).view(-1, 5))


def read_across(y: Tensor) -> Tensor:
    """Read the memory of transposed means as if it were contiguous."""
    means = y.mean((2, 3), keepdim=True).transpose(0, 1).contiguous().transpose(0, 1)
    return means.as_strided((7, 6, 1, 1), (6, 1, 6, 6))


def onto_a_parameter(y: Tensor) -> Tensor:
    base = torch.arange(6.0, dtype=y.dtype).view(6, 1, 1, 1).expand(6, *y.shape[1:])
    return base.clone().requires_grad_().scatter_add(0, everywhere(y), y)


def queries(x: Tensor, w: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    q = x @ w.t()
    return ln(F.scaled_dot_product_attention(q, x[..., :4].repeat(1, 1, 2)[..., :6], x[..., [0, 1, 2, 3, 0, 1]]))


CASES: dict[str, Case] = {
    # indices
    "index": Case(normed(lambda y: y[:, PICK]), "filter", 6),
    "index-with-a-mask": Case(normed(lambda y: y[torch.tensor([True, False] * 3 + [True])]), "filter", 6),
    "index-of-batch": Case(normed(lambda y: y[NODES]), "filter", 6),
    "index-of-places": Case(normed(lambda y: y[:, :, torch.tensor([0, 1]), torch.tensor([1, 0])]), "filter", 6),
    "index-of-several": Case(normed(lambda y: y[torch.tensor([0, 1]), :, torch.tensor([1, 0])]), "filter", 6),
    "index-of-rows-among-several": Case(
        normed(lambda y: y[torch.tensor([0, 1, 3]), torch.tensor([1, 0, 5])].unsqueeze(1)), "layer", 1
    ),
    "index-then-group-norm": Case(grouped(lambda y: y[:, [0, 3, 1, 2, 5, 4]]), "layer", 1),
    "index-select": Case(normed(lambda y: y.index_select(1, PICK)), "filter", 6),
    "index-select-twice": Case(
        normed(lambda y: y.index_select(1, PICK) + y.index_select(1, PICK.flip(0))), "layer", 1
    ),
    "index-of-a-matrix": Case(normed(lambda y: y[:, PICK.view(5, 1)].flatten(1, 2)), "filter", 6),
    "gather-of-places": Case(
        normed(lambda y: y.gather(0, torch.zeros(2, *y.shape[1:], dtype=torch.long))), "filter", 6
    ),
    "gather-of-channels": Case(
        normed(lambda y: y.gather(1, torch.arange(7).view(7, 1, 1, 1).expand(7, 2, 2, 2) % 6)), "layer", 1
    ),
    "embedding": Case(lambda x, w: ln(F.embedding(tokens(x), w)), "filter", 9, weight=(9, 5)),
    "embedding-then-view": Case(lambda x, w: ln(F.embedding(tokens(x), w).view(-1, 5)), "filter", 9, weight=(9, 5)),
    "embedding-as-index": Case(lambda x, w: ln(w[tokens(x)]), "filter", 9, weight=(9, 5)),
    "embedding-then-batch-norm": Case(
        lambda x, w: bn(F.embedding(tokens(x), w).transpose(1, 2)), "layer", 1, weight=(9, 5)
    ),
    "embedding-with-transpose": Case(
        lambda x, w: ln(F.embedding(tokens(x), w) + F.embedding(tokens(x), w).flip(1)), "layer", 1, weight=(9, 5)
    ),
    "embedding-square": Case(
        lambda x, w: ln((e := F.embedding(tokens(x)[:7, :7], w)) + e.transpose(0, 1)), "layer", 1, weight=(9, 5)
    ),
    "embedding-with-positions": Case(
        lambda x, w: ln(F.embedding(tokens(x), w) + torch.arange(40.0).view(8, 5)), "none", 9, weight=(9, 5)
    ),
    "embedding-in-two-orders": Case(two_orders, "layer", 1, weight=(9, 5)),
    "bag-of-words": Case(lambda x, w: ln(F.embedding(tokens(x), w).sum(1)), "layer", 1, weight=(9, 5)),
    # in-place writes
    "scatter-add": Case(normed(lambda y: zeros(y).scatter_add(0, everywhere(y), y)), "filter", 6, True),
    "scatter-add-in-place": Case(normed(lambda y: zeros(y).scatter_add_(0, everywhere(y), y)), "filter", 6, True),
    "scatter-add-to-input": Case(
        lambda x, w: bn(x[:6, :, :2, :2].repeat(1, 2, 1, 1)[:, :6].scatter_add(0, everywhere(conv(x, w)), conv(x, w))),
        "none",
        6,
    ),
    "scatter-add-to-a-parameter": Case(normed(onto_a_parameter), "none", 6),
    "scatter-add-over-channels": Case(normed(channel_sums), "layer", 1, True),
    "scatter": Case(normed(lambda y: zeros(y, 9).scatter(0, along(y, 0), y)), "filter", 6, True),
    "scatter-reduce": Case(
        normed(lambda y: zeros(y).scatter_reduce(0, everywhere(y), y, "amax", include_self=False)), "filter", 6, True
    ),
    "scatter-reduce-over-ones": Case(
        normed(lambda y: (zeros(y, 9) + 1).scatter_reduce(0, everywhere(y), y, "amax", include_self=False)), "none", 6
    ),
    "scatter-product": Case(
        normed(lambda y: zeros(y).scatter_reduce(0, everywhere(y), y, "prod", include_self=False)), "none", 6
    ),
    "index-add": Case(normed(lambda y: zeros(y).index_add(0, NODES, y)), "filter", 6, True),
    "index-add-to-nodes": Case(
        normed(lambda y: (zeros(y) + torch.arange(6.0).view(6, 1, 1, 1)).index_add(0, NODES, y)), "none", 6
    ),
    "index-add-to-itself": Case(normed(lambda y: y.index_add(0, NODES, y)), "filter", 6),
    "index-put": Case(normed(over_zeros), "filter", 6, True),
    "masked-in-place": Case(normed(masked), "filter", 6, True),
    "where": Case(normed(lambda y: torch.where(y > 0, y, 0.2 * y)), "filter", 6),
    "where-zero": Case(normed(lambda y: torch.where(y > 0, y, 0.0)), "filter", 6, True),
    "where-one": Case(normed(lambda y: torch.where(y > 0, y, 1.0)), "none", 6),
    "where-method-one": Case(normed(lambda y: torch.ones_like(y).where(y < 0, y)), "none", 6),
    "where-integer": Case(normed(lambda y: torch.where(y > 0, y, torch.tensor(1))), "none", 6),
    "masked-fill": Case(normed(lambda y: y.masked_fill(y < 0, 0)), "filter", 6, True),
    "masked-fill-by-one": Case(normed(lambda y: y.masked_fill(y < 0, 1)), "none", 6),
    "padded": Case(normed(lambda y: F.pad(y, (1, 0, 2, 1))), "filter", 6, True),
    "padded-by-one": Case(normed(lambda y: F.pad(y, (1, 0, 2, 1), value=1.0)), "none", 6),
    "padded-channels-by-one": Case(normed(lambda y: F.pad(y, (0, 0, 0, 0, 1, 1), value=1.0)), "filter", 6),
    "cropped": Case(normed(lambda y: F.pad(y, (-1, 0))), "filter", 6),
    # moved entries
    "flip": Case(normed(lambda y: y.flip(2)), "filter", 6),
    "flip-channels": Case(normed(lambda y: y.flip(1)), "filter", 6),
    "flip-channels-and-add": Case(normed(lambda y: y + y.flip(1)), "none", 6),
    "flip-channels-then-groups": Case(grouped(lambda y: y.flip(1)), "group", 3),
    "roll": Case(normed(lambda y: y.roll((1, 1), (2, 3))), "filter", 6),
    "roll-channels": Case(normed(lambda y: y.roll(1, 1)), "filter", 6),
    "roll-flat": Case(normed(lambda y: y.roll(1)), "none", 6),
    "repeat": Case(normed(lambda y: y.repeat(1, 2, 1, 2)), "filter", 6),
    "repeat-then-groups": Case(lambda x, w: gn(conv(x, w).repeat(1, 2, 1, 1), 2), "layer", 1),
    "repeat-then-each-group": Case(lambda x, w: gn(conv(x, w).repeat(1, 2, 1, 1), 6), "group", 3),
    "repeat-interleave": Case(normed(lambda y: y.repeat_interleave(2, 1)), "filter", 6),
    "stack": Case(normed(lambda y: torch.stack([y, -2 * y]).flatten(0, 1)), "filter", 6),
    "stack-with-ones": Case(normed(lambda y: torch.stack([y, torch.ones_like(y)]).flatten(0, 1)), "none", 6),
    "stack-of-channels-with-ones": Case(
        lambda x, w: ln(torch.stack([y := conv(x, w).flatten(2), torch.ones_like(y)], 1)), "filter", 6
    ),
    "two-views": Case(lambda x, w: bn(torch.cat([conv(x, w), conv(x.flip(0), w)])), "filter", 6),
    "view-and-input": Case(lambda x, w: bn(torch.cat([conv(x, w), x[:, [0, 1, 2, 3, 0, 1], 1:3, 1:3]])), "none", 6),
    "zeros-joined": Case(normed(lambda y: torch.cat([y, torch.zeros_like(y)])), "filter", 6, True),
    "class-token": Case(linear(token), "layer", 1, weight=MATRIX),
    "class-token-then-mean": Case(linear(lambda y: token(y).mean(1)), "none", 6, weight=MATRIX),
    "pixel-shuffle": Case(lambda x, w: bn(F.pixel_shuffle(conv(x, w), 2)), "group", 2, weight=(8, 4, 3, 3)),
    "pixel-unshuffle": Case(normed(lambda y: F.pixel_unshuffle(y, 2)), "filter", 6),
    "pixel-unshuffle-then-groups": Case(lambda x, w: gn(F.pixel_unshuffle(conv(x, w), 2), 6), "filter", 6),
    "pixel-shuffle-back": Case(normed(lambda y: F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2)), "filter", 6),
    "channel-shuffle": Case(normed(lambda y: F.channel_shuffle(y, 2)), "filter", 6),
    "channel-shuffle-then-groups": Case(grouped(lambda y: F.channel_shuffle(y, 3)), "none", 6),
    "signed-root": Case(normed(lambda y: y.sign() * y.abs().sqrt()), "filter", 6),
    "signed-root-copied": Case(normed(lambda y: torch.copysign(y.abs().sqrt(), y)), "filter", 6),
    "sign-and-value": Case(normed(lambda y: y.sign() + y), "none", 6),
    "lp-pooling": Case(normed(lambda y: F.lp_pool2d(y, 2.0, 2)), "filter", 6),
    "rotation": Case(normed(lambda y: torch.rot90(y, 1, (2, 3))), "filter", 6),
    "rotation-of-channels": Case(normed(lambda y: torch.rot90(y, 1, (1, 2))), "layer", 1),
    "fourier": Case(normed(lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * torch.arange(2), s=(2, 2))), "filter", 6),
    "fourier-of-channels": Case(normed(lambda y: torch.fft.fft(y, dim=1).abs()), "layer", 1),
    "grid": Case(normed(lambda y: F.grid_sample(y, GRID.expand(len(y), -1, -1, -1), align_corners=False)), "filter", 6),
    "unpooling": Case(normed(lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2)), "filter", 6),
    "unsafe-split": Case(normed(lambda y: torch.cat(torch.unsafe_split(y, 2, 1)[::-1], 1)), "filter", 6),
    "bags": Case(lambda x, w: bn(bags(x, w)), "filter", 4, weight=(9, 4)),
    "bags-and-one": Case(lambda x, w: bn((bags(x, w) + 1).relu()), "none", 9, weight=(9, 4)),
    "patches": Case(lambda x, w: bn(F.unfold(conv(x, w), 2, padding=1)), "filter", 6),
    "patches-then-groups": Case(lambda x, w: gn(F.unfold(conv(x, w), 2), 6), "filter", 6),
    "patches-back": Case(normed(lambda y: F.fold(F.unfold(y, 2, padding=1), (2, 2), 2, padding=1)), "filter", 6),
    "windows": Case(normed(lambda y: y.unfold(2, 2, 1).flatten(3)), "filter", 6),
    "windows-of-channels": Case(lambda x, w: ln(conv(x, w).unfold(1, 3, 1)), "layer", 1),
    "channels-last-pool": Case(normed(channels_last_pool), "filter", 6),
    "as-strided": Case(normed(lambda y: y.contiguous().as_strided((7, 6, 2), (4, 28, 1))), "none", 6),
    "as-strided-means": Case(normed(read_across), "none", 6),
    "triangle": Case(normed(torch.tril), "filter", 6),
    "sorted-places": Case(normed(lambda y: y.sort(2)[0]), "filter", 6),
    "sorted-channels": Case(normed(lambda y: y.sort(1)[0]), "layer", 1),
    "largest-channels": Case(normed(lambda y: y.topk(2, 1)[0]), "layer", 1),
    "largest": Case(normed(lambda y: y.max(2)[0]), "filter", 6),
    "cumulative-sum": Case(normed(lambda y: y.cumsum(3)), "filter", 6),
    # arithmetic
    "addcmul": Case(normed(lambda y: torch.addcmul(y, y, torch.ones_like(y), value=0.5)), "filter", 6),
    "addcmul-residual": Case(lambda x, w: bn(torch.addcmul(x[:, :1, :2, :2], conv(x, w), x[:, :1, :2, :2])), "none", 6),
    "addcmul-of-degree-two": Case(normed(lambda y: torch.addcmul(y, y, y)), "none", 6),
    "addcdiv": Case(normed(lambda y: torch.addcdiv(y, y, torch.full_like(y, 2.0))), "filter", 6),
    "addcdiv-inverse": Case(normed(lambda y: torch.addcdiv(y, torch.ones_like(y), y)), "none", 6),
    "interpolated": Case(normed(lambda y: torch.lerp(y, y.flip(2), 0.3)), "filter", 6),
    "maximum": Case(normed(lambda y: torch.maximum(y, y.flip(2))), "filter", 6),
    "maximum-of-zero": Case(normed(lambda y: torch.maximum(y, torch.zeros(()).to(y))), "filter", 6, True),
    "maximum-of-one": Case(normed(lambda y: torch.maximum(y, torch.ones(()).to(y))), "none", 6),
    "clamp-above-at-zero": Case(normed(lambda y: y.clamp(max=0)), "filter", 6),
    "clamp-above": Case(normed(lambda y: y.clamp(max=0.5)), "none", 6),
    "relu6": Case(normed(lambda y: F.relu6(9 * y)), "none", 6),
    "threshold": Case(normed(lambda y: F.threshold(y, 0.0, 0.7)), "none", 6),
    "glu": Case(normed(lambda y: F.glu(y, 1)), "none", 6),
    "prelu-shared": Case(normed(lambda y: F.prelu(y, torch.full((1,), 0.2).to(y))), "filter", 6),
    "power-of-a-half": Case(pow_norm, "layer", 1, True, weight=MATRIX),
    "double-star": Case(star_norm, "layer", 1, weight=MATRIX),
    "product-of-both-sides": Case(bilinear, "none", 6, weight=MATRIX),
    "matrix-and-vector-of-both-sides": Case(matrix_vector, "none", 4, weight=MATRIX),
    "sparse-product": Case(sparse, "filter", 6, weight=MATRIX),
    "attention-values": Case(values, "layer", 1, weight=MATRIX),
    "attention-queries-and-values": Case(queries_and_values, "none", 6, weight=MATRIX),
    "attention-queries": Case(queries, "none", 6, weight=MATRIX),
    # slices of other dimensions
    "class-rows": Case(class_head, "filter", 6, weight=MATRIX),
    "class-columns": Case(class_columns, "filter", 4, weight=MATRIX),
    "arcface": Case(arcface, "filter", 6, weight=MATRIX),
    "heads-in-the-middle": Case(heads("ntd,dhe->nhte", ln), "filter", 3, weight=(4, 3, 5)),
    "heads-in-front": Case(heads("ntd,hde->nhte", ln), "filter", 3, weight=(3, 4, 5)),
    "heads-and-features": Case(
        heads("ntd,hed->nhet", lambda y: bn(y.flatten(1, 2))), "filter", 15, weight=(3, 5, 4)
    ),
    "heads-normalized-together": Case(
        heads("ntd,dhe->nthe", lambda y: ln(y.flatten(2))), "layer", 1, weight=(4, 3, 5)
    ),
    "unit-queries": Case(heads("ntd,dhe->nhte", lambda y: F.normalize(y, dim=-1)), "filter", 3, weight=(4, 3, 5)),
}  # fmt: skip


def batch() -> Tensor:
    return torch.randn(7, 4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loss_of(layer: Layer) -> Tensor:
    y = layer(batch())
    readout = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    return (y * readout).sum() + y.pow(3).sum()


def largest_cosine(layer: Layer, units: WeightUnits) -> float:
    layer.zero_grad()
    loss_of(layer).backward()
    live = units.rows(layer.weight.grad).norm(dim=1) > 0
    cosines = weight_gradient_cosine(units.rows(layer.weight), units.rows(layer.weight.grad))
    return cosines[live].abs().max().item()


def scaled_apart(layer: Layer, units: WeightUnits) -> float:
    """Return the relative change of the loss if each unit is scaled by a factor of its own."""
    before = loss_of(layer).item()
    generator = torch.Generator().manual_seed(5)
    factors = 0.99 + 0.02 * torch.rand(units.count, 1, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        rows = layer.weight.detach().clone()
        index = units.rows(torch.arange(rows.numel()).view_as(rows)).flatten()
        rows.view(-1)[index] = (units.rows(layer.weight) * factors).flatten()
        scaled = Layer(tuple(rows.shape), layer.function)
        scaled.weight.copy_(rows)
    return abs(loss_of(scaled).item() - before) / abs(before)


def skip_if_missed_on_old_torch(name: str, units: Any) -> None:
    """Torch 2.6 hides the saved tensors that show the picked entries, so no units are claimed there."""
    reads_saved = name.startswith("index") or name in ("embedding-as-index", "scatter-reduce")
    if reads_saved and units.kind == "none" and not hasattr(torch._C._autograd.SavedTensor, "data"):
        pytest.skip("torch does not show saved tensors without unpacking them")


@pytest.mark.parametrize("name", CASES)
def test_units_are_true_and_found(name: str) -> None:
    case = CASES[name]
    layer = Layer(case.weight, case.function)
    (units,) = scale_invariant_units(layer, batch())
    skip_if_missed_on_old_torch(name, units)
    assert (units.kind, units.count) == (case.kind, case.count), units.reason or units.normalization
    if units.invariant:
        assert largest_cosine(layer, units) < 1e-12
        assert scaled_apart(layer, units) < 1e-10
    else:
        assert largest_cosine(layer, units) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_graph_alone_claims_no_more(name: str) -> None:
    case = CASES[name]
    layer = Layer(case.weight, case.function)
    (units,) = units_from_graph(layer, loss_of(layer))
    skip_if_missed_on_old_torch(name, units)
    assert units.kind == ("none" if case.needs_trace else case.kind), units.reason or units.normalization
