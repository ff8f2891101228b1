"""Small networks in float64 with scale symmetries of all kinds, with ε so small that they hold to rounding."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lightning_normgeo import scale_symmetries
from support.tensors import draw

EPS = 1e-60


class MLP(nn.Module):
    """A perceptron with two hidden layers."""

    def __init__(self, batch_norm=False, activation=F.relu):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(5) if batch_norm else nn.Identity()
        self.activation = activation

    def forward(self, x):
        return self.c(self.activation(self.b(self.activation(self.norm(self.a(x))))))


class ConvNet(nn.Module):
    """Convolutions with biases before batch normalizations, one of them grouped, and a residual connection."""

    def __init__(self, bias=True):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        self.a, self.norm_a = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 3, padding=1, bias=bias, groups=2), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))
        return self.head(x.mean((2, 3)))


class PreActivation(nn.Module):
    """A pre-activation residual network, whose stream is invariant only jointly."""

    def __init__(self, bias=True):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.Linear(4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=bias) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for k in (0, 2):
            inner = self.convolutions[k](F.relu(self.norms[k](x)))
            x = x + self.convolutions[k + 1](F.relu(self.norms[k + 1](inner)))
        return self.head(F.relu(self.norms[4](x)).mean((2, 3)))


class Mixed(nn.Module):
    """Weight normalization, a grouped transposed convolution, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.up, self.norm = nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.GroupNorm(3, 6)
        self.twice, self.last = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.leaky_relu(self.normed(F.relu(self.first(x))))
        x = self.twice(F.relu(self.norm(self.up(x))))
        return self.head(F.max_pool2d(self.last(F.relu(self.twice(x))), 2).mean((2, 3)))


class RMSNorm(nn.Module):
    """Root mean square normalization in elementary operations."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.weight


class Attention(nn.Module):
    """Causal attention with two heads, and optionally rotary positions, shared keys and values, normed queries."""

    def __init__(self, width, bias=True, rotary=False, shared=2, normed=False):
        super().__init__()
        self.size, self.rotary, self.shared = width // 2, rotary, shared
        self.q, self.o = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.k, self.v = (nn.Linear(width, shared * self.size, bias) for _ in range(2))
        self.norm_q, self.norm_k = (RMSNorm(self.size) if normed else nn.Identity() for _ in range(2))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.norm_q(q), self.norm_k(k)
        if self.rotary:
            rates = torch.tensor([0.7**i for i in range(self.size // 2)], dtype=x.dtype).repeat(2)
            angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * rates
            q, k = (
                t * angles.cos() + torch.cat([-t[..., self.size // 2 :], t[..., : self.size // 2]], -1) * angles.sin()
                for t in (q, k)
            )
        k, v = (t.repeat_interleave(2 // self.shared, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """A SwiGLU perceptron."""

    def __init__(self, width):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(width, 5, False),
            nn.Linear(width, 5, False),
            nn.Linear(5, width, False),
        )

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Transformer(nn.Module):
    """A language model of two blocks: like GPT with layer normalizations, or like Llama with RMS normalizations."""

    def __init__(self, width=6, llama=False, relu=False, **attention):
        super().__init__()
        norm = RMSNorm if llama else nn.LayerNorm
        self.embed, self.head = nn.Embedding(7, width), nn.Linear(width, 7, not llama)
        self.position = None if llama else nn.Parameter(torch.zeros(5, width))
        self.norms = nn.ModuleList(norm(width) for _ in range(5))
        self.attentions = nn.ModuleList(Attention(width, not llama, rotary=llama, **attention) for _ in range(2))
        perceptron = nn.Sequential(nn.Linear(width, 7), nn.ReLU() if relu else nn.GELU(), nn.Linear(7, width))
        self.perceptrons = nn.ModuleList(Gated(width) if llama else perceptron for _ in range(2))

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x if self.position is None else x + self.position
        for k in range(2):
            x = x + self.attentions[k](self.norms[2 * k](x))
            x = x + self.perceptrons[k](self.norms[2 * k + 1](x))
        return self.head(self.norms[4](x))


class VisionTransformer(nn.Module):
    """A vision transformer with one of torch's encoder layers, whose projection of q, k and v is packed."""

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(2, 6, 2, 2), nn.Linear(6, 3)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 5, 6))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(6, 2, 7, 0.0, "relu", batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def vectors():
    return draw(9, 4, seed=50)


def images():
    return draw(5, 2, 4, 4, seed=51)


def tokens():
    return torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(52))


NETWORKS = {
    "relu perceptron": (MLP, vectors),
    "perceptron with batch norm": (lambda: MLP(batch_norm=True), vectors),
    "convolutions": (lambda: ConvNet(bias=False), images),
    "convolutions with biases": (ConvNet, images),
    "pre-activation": (lambda: PreActivation(bias=False), images),
    "pre-activation with biases": (PreActivation, images),
    "mixed": (Mixed, images),
    "gpt": (Transformer, tokens),
    "gpt with relu": (lambda: Transformer(relu=True), tokens),
    "llama": (lambda: Transformer(8, llama=True), tokens),
    "llama with shared keys": (lambda: Transformer(8, llama=True, shared=1), tokens),
    "llama with normed queries": (lambda: Transformer(8, llama=True, normed=True), tokens),
    "vision transformer": (VisionTransformer, images),
}


def network(name, seed=0):
    """Return a network with random weights and running statistics in training mode, and a batch."""
    make, data = NETWORKS[name]
    torch.manual_seed(seed)
    module = make().double().train()
    for child in module.modules():
        if hasattr(child, "eps"):
            child.eps = EPS
    for k, parameter in enumerate(module.parameters()):
        parameter.data = 0.7 * draw(*parameter.shape, seed=100 * seed + k) + 0.1
    batch = data()
    with torch.no_grad():
        for _ in range(3):
            module(batch)
    return module, batch


def symmetric(name, seed=0):
    """Return a network, a batch, and the symmetries of the network."""
    module, batch = network(name, seed)
    return module, batch, scale_symmetries(module, batch)


def loss_of(module, batch):
    """Return a loss that depends on all outputs; running statistics stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    output = torch.func.functional_call(module, buffers, (batch,))
    return (output.flatten(0, -2).log_softmax(-1) * draw(output.shape[-1], seed=53)).mean()
