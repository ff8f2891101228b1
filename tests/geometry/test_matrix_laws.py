"""Matrix laws of attention heads and of an RMSNorm stream, on small modules in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry import query_key_law, rotation_charge, value_output_law
from support import reference as ref
from support.tensors import PROPERTY, SEED, close, draw


class Attention(nn.Module):
    """Self-attention with ``heads`` of four channels, and keys and values that groups of heads may share."""

    def __init__(self, width, heads, shared=None, bias=True, rotary=False):
        super().__init__()
        self.heads, self.shared, self.rotary = heads, shared or heads, rotary
        self.q = nn.Linear(width, 4 * heads, bias)
        self.k, self.v = (nn.Linear(width, 4 * self.shared, bias) for _ in range(2))
        self.o = nn.Linear(4 * heads, width, bias)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.rotary:
            turn = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.3]).double()
            q, k = (
                torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (2, 2))) * torch.exp(1j * turn)).flatten(-2)
                for t in (q, k)
            )
        k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def columns(layer):
    """Return weight and gradient of a layer, with the bias as another column."""
    pairs = zip(
        (layer.weight, layer.weight.grad), (layer.bias, None if layer.bias is None else layer.bias.grad), strict=True
    )
    return [w.detach() if b is None else torch.cat([w.detach(), b.detach()[:, None]], 1) for w, b in pairs]


def backward(module, x, seed=0):
    for k, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=100 * seed + k)
    (module(x).tanh() * draw(*x.shape, seed=7)).sum().backward()


SHAPES = [(2, None, True), (3, None, False), (4, 2, True), (4, 1, False)]


@pytest.mark.parametrize(("heads", "shared", "bias"), SHAPES)
def test_laws_of_heads_hold(heads, shared, bias):
    module, x = Attention(6, heads, shared, bias).double(), draw(3, 5, 6)
    backward(module, x)
    queries = query_key_law(*columns(module.q), *columns(module.k), heads, shared)
    values = value_output_law(*columns(module.v), module.o.weight.detach(), module.o.weight.grad, heads, shared)
    for law in (queries, values):
        assert law.left.shape == (shared or heads, 4, 4)
        assert law.left.abs().amin(dim=(1, 2)).min() > 1e-9
        assert law.error.max() <= 1e-12


def test_rotary_positions_break_the_law_of_queries_and_keep_that_of_values():
    module, x = Attention(6, 2, rotary=True).double(), draw(3, 5, 6)
    backward(module, x)
    assert query_key_law(*columns(module.q), *columns(module.k), 2).error.min() > 1e-2
    values = value_output_law(*columns(module.v), module.o.weight.detach(), module.o.weight.grad, 2)
    assert values.error.max() <= 1e-12


@PROPERTY
@given(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]), st.integers(1, 3), st.integers(2, 5), SEED)
def test_sides_equal_the_exact_products(shape, channels, width, seed):
    heads, shared = shape
    query, query_gradient, output, output_gradient = draw(4, heads * channels, width, seed=seed)
    key, key_gradient = draw(2, shared * channels, width, seed=seed + 1)

    def blocks(rows, count):
        return rows.unflatten(0, (count, channels)).tolist()

    def over_groups(matrices):
        size = heads // shared
        whole = torch.tensor(matrices, dtype=torch.float64)
        return [whole[k * size : (k + 1) * size].sum(0).tolist() for k in range(shared)]

    def exact(a, b, count):
        return [ref.product(x, y) for x, y in zip(blocks(a, count), blocks(b, count), strict=True)]

    law = query_key_law(query, query_gradient, key, key_gradient, heads, shared)
    close(law.left, over_groups(exact(query_gradient, query, heads)))
    close(law.right, exact(key, key_gradient, shared))
    law = value_output_law(key, key_gradient, output.T, output_gradient.T, heads, shared)
    close(law.left, exact(key_gradient, key, shared))
    close(law.right, over_groups(exact(output, output_gradient, heads)))


class Stream(nn.Module):
    """An RMSNorm network with a residual stream, in which only the readers may hold γ."""

    def __init__(self, width, gamma=False):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.read = nn.ModuleList(nn.Linear(width, 9) for _ in range(2))
        self.write = nn.ModuleList(nn.Linear(9, width) for _ in range(2))
        self.head = nn.Linear(width, 4)
        self.gamma = nn.Parameter(torch.ones(width)) if gamma else None

    def forward(self, tokens):
        x = self.embed(tokens)
        for read, write in zip(self.read, self.write, strict=True):
            x = x + write(F.silu(read(F.rms_norm(x, x.shape[-1:], self.gamma, eps=1e-30))))
        return self.head(F.rms_norm(x, x.shape[-1:], eps=1e-30))

    def parts(self):
        def pair(weight):
            return weight.detach(), weight.grad

        table, gradient = pair(self.embed.weight)
        writers = [(table.T, gradient.T), *(tuple(columns(layer)) for layer in self.write)]
        return writers, [pair(layer.weight) for layer in (*self.read, self.head)]


@pytest.mark.parametrize("gamma", [False, True])
def test_a_stream_without_gamma_can_be_rotated(gamma):
    module = Stream(6, gamma).double()
    for k, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=k)
    tokens = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(0))
    (module(tokens).tanh() * draw(3, 5, 4)).sum().backward()
    writers, readers = module.parts()
    found = rotation_charge(writers, readers)
    size = sum(float((w @ g.T).norm()) for w, g in writers) + sum(float((w.T @ g).norm()) for w, g in readers)
    assert torch.equal(found, -found.T)
    assert (found.norm() <= 1e-12 * size) == (not gamma)
    assert gamma == bool(found.norm() > 1e-3 * size)


@PROPERTY
@given(st.integers(2, 4), SEED)
def test_rotation_charge_equals_the_exact_sum(width, seed):
    writer, reader = draw(2, width, 5, seed=seed), draw(2, 3, width, seed=seed + 1)
    pairs = writer, reader.mT
    first, second = (torch.tensor(ref.product(*pair.tolist()), dtype=torch.float64) for pair in pairs)
    whole = first + second
    found = rotation_charge([tuple(writer)], [tuple(reader)])
    assert (found - (whole - whole.T)).abs().max() <= 1e-14 * (first.abs().max() + second.abs().max())


def test_a_law_of_zeros_has_no_error():
    zeros = torch.zeros(4, 3)
    assert query_key_law(zeros, zeros, zeros, zeros, 2).error.tolist() == [0, 0]
    with pytest.raises(ConfigurationError, match="Give pairs"):
        rotation_charge([], [])
