"""Small networks whose scale symmetries are compared with a numerical oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import symmetry_images as images
from support import symmetry_modules as modules
from support.symmetry_modules import chain, frozen
from support.symmetry_parts import (
    Attention,
    Function,
    GatedMLP,
    LanguageModel,
    Parallel,
    Residual,
    RMSNorm,
    Scale,
    UnitNorm,
    alibi,
    causal,
    mlp,
    rotary,
    transformer,
)


@dataclass(frozen=True)
class Case:
    """A network, and what is known about its symmetries.

    Attributes:
        build: returns the network.
        data: returns a random input.
        loss: function of the outputs. Default: any.
        missed: number of symmetries that the search is known to miss.
        why: reason for that.
        slow: whether its oracle takes long.
    """

    build: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Callable[[Any], Tensor] | None = None
    missed: int = 0
    why: str = ""
    slow: bool = False


def _tokens() -> Tensor:
    return torch.randint(0, 5, (3, 4))


def _rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


_image, _row, _vectors = _rows(4, 2, 4, 4), _rows(9, 3), _rows(3, 4, 4)
_gated = partial(GatedMLP, hidden=4)
_rms: dict[str, Any] = {"norm": RMSNorm, "feed_forward": _gated, "positions": 0}


def _attention(**options: Any) -> Callable[..., nn.Module]:
    return partial(Attention, **options)


def _one_head(**options: Any) -> Callable[..., nn.Module]:
    return lambda width, heads: Attention(width, 1, **options)


def _language(build: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(build, _tokens, **options)


def _post_norm() -> nn.Module:
    blocks = [Residual(Attention(4, 2)), nn.LayerNorm(4), Residual(mlp(4, 5, F.gelu)), nn.LayerNorm(4)]
    return LanguageModel(*blocks, width=4)


def _sandwich() -> nn.Module:
    """Return a block with LayerScale, of which one is zero at the start of training."""
    blocks = [
        Residual(nn.LayerNorm(4), Attention(4, 2), Scale(4)),
        Residual(nn.LayerNorm(4), mlp(4, 5, F.gelu), Scale(4)),
    ]
    return LanguageModel(*blocks, width=4, final=nn.LayerNorm(4))


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


NETWORKS: dict[str, Case] = {
    "ReLU layers": Case(lambda: chain(3, 5, 4, 3), _row),
    "ReLU layers, batch normalization": Case(lambda: chain(3, 5, 4, 3, norm=True), _row),
    "GELU layers": Case(lambda: chain(3, 5, 4, 3, function=F.gelu), _row),
    "post-activation residual, groups": Case(images.post_activation, _image),
    "post-activation residual, biases": Case(partial(images.post_activation, bias=True), _image),
    "pre-activation residual": Case(partial(images.pre_activation, nn.BatchNorm2d, depth=1), _image),
    "pre-activation residual, biases": Case(partial(images.pre_activation, nn.BatchNorm2d, bias=True, depth=1), _image),
    "pre-activation residual, groups": Case(
        partial(images.pre_activation, partial(nn.GroupNorm, 2), bias=True, depth=1), _image
    ),
    "pre-activation residual, layers": Case(partial(images.pre_activation, partial(nn.GroupNorm, 1), depth=1), _image),
    "two pre-activation blocks": Case(partial(images.pre_activation, nn.BatchNorm2d, bias=True), _image, slow=True),
    "weight normalization, transposed, shared": Case(images.mixed, _image),
    "GPT": _language(transformer),
    "GPT, tied": _language(partial(transformer, tied=True)),
    "GPT, ReLU, scores by hand": _language(
        partial(transformer, _attention(scores=causal), partial(mlp, hidden=5, function=F.relu))
    ),
    "Llama": _language(partial(transformer, _attention(bias=False, positions=rotary), **_rms)),
    "Llama, grouped queries": _language(
        partial(transformer, _attention(bias=False, positions=rotary, groups=1), **_rms)
    ),
    "Llama, normalized queries": _language(partial(transformer, _attention(bias=False, norm=RMSNorm), **_rms)),
    "GPT, normalized queries": _language(partial(transformer, _one_head(norm=nn.LayerNorm))),
    "GPT, unit queries": _language(partial(transformer, _attention(norm=UnitNorm))),
    "post-norm": _language(_post_norm),
    "squared ReLU": _language(
        partial(
            transformer, _attention(bias=False), partial(mlp, hidden=5, function=_squared_relu, bias=False), RMSNorm
        )
    ),
    "no final normalization": _language(
        partial(transformer, _attention(bias=False), norm=RMSNorm, final=nn.Identity())
    ),
    "vision transformer": Case(images.VisionTransformer, _image),
    "two layers of a vision transformer": Case(partial(images.VisionTransformer, depth=2), _image, slow=True),
    "two layers of GPT": _language(partial(transformer, depth=2), slow=True),
    "ALiBi": _language(partial(transformer, _attention(scores=alibi), positions=0)),
    "parallel blocks": _language(
        lambda: LanguageModel(
            Parallel(nn.LayerNorm(4), Attention(4, 2), mlp(4, 5, F.gelu)), width=4, final=nn.LayerNorm(4)
        )
    ),
    "LayerScale": _language(_sandwich),
    "SwiGLU with biases": _language(partial(transformer, feed_forward=partial(GatedMLP, hidden=4, bias=True))),
    "torch's RMSNorm, tied": _language(
        partial(transformer, _attention(bias=False), norm=nn.RMSNorm, feed_forward=_gated, tied=True)
    ),
    "dropout": _language(
        lambda: LanguageModel(
            nn.Dropout(0.2), Residual(RMSNorm(4), mlp(4, 5, F.relu), nn.Dropout(0.3)), width=4, final=RMSNorm(4)
        )
    ),
    "stacked experts": Case(lambda: modules.StackedExperts(3, 3, 3), _row),
    "listed experts": Case(lambda: modules.ListedExperts(3, 3, 2), _rows(16, 3)),
    "heads by einsum": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), modules.HeadsByEinsum(4, 2, 2), nn.LayerNorm(4), nn.Linear(4, 2)),
        _vectors,
    ),
    "heads by einsum, inputs first": Case(lambda: modules.InputsFirst(4, 2, 3), _vectors),
    "attention with dropout": Case(lambda: modules.AttentionWithDropout(4), _vectors),
    "gated linear unit": Case(lambda: nn.Sequential(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2)), _row),
    "nn.MultiheadAttention": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), modules.SelfAttention(4), nn.LayerNorm(4)), _vectors
    ),
    "nn.MultiheadAttention, key biases": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), modules.SelfAttention(4, add_bias_kv=True)), _vectors
    ),
    "GRU cell": Case(lambda: modules.GatedCell(2, 3), _rows(4, 3, 2)),
    "U-Net with attention": Case(images.UNet, _image),
    "separable, ReLU": Case(partial(images.separable, nn.ReLU), _image),
    "separable, ReLU, no normalization": Case(partial(images.separable, nn.ReLU, norm=False), _image),
    "separable, ReLU6": Case(partial(images.separable, partial(nn.Hardtanh, 0, 0.5)), _image),
    "weight normalization, old and new": Case(images.weight_normed, _image),
    "weight normalization of positions": Case(images.positions_normed, _rows(4, 2, 6)),
    "weight standardization": Case(images.standardized, _image),
    "spectral normalization": Case(images.spectral, _image),
    "instance normalization, PReLU": Case(images.instance_normalized, _image),
    "pooling and padding": Case(images.pooled, _image, missed=4, why="circular padding writes into views (CopySlices)"),
    "transposed convolutions": Case(images.transposed, _image),
    "squeeze and excitation": Case(
        lambda: nn.Sequential(
            images.conv(2, 4), nn.ReLU(), images.SqueezeExcitation(4), nn.BatchNorm2d(4), images.Head(4)
        ),
        _image,
    ),
    "squeeze and excitation by ReLU": Case(
        lambda: nn.Sequential(images.conv(2, 4), nn.ReLU(), images.SqueezeExcitation(4, torch.relu), images.Head(4)),
        _image,
    ),
    "three dimensions": Case(images.volumes, _rows(3, 1, 3, 3, 3)),
    "one dimension": Case(images.sequences, _rows(4, 2, 4)),
    "cut, flipped and joined weights": Case(
        modules.Learned,
        _row,
        missed=2,
        why="in each half of the table columns have exponents of their own, but a matrix gets only one for each column",
    ),
    "frozen β": Case(
        lambda: frozen(images.pre_activation(nn.BatchNorm2d, depth=1), "1.body.0.bias", "1.body.3.bias"), _image
    ),
    "frozen γ": Case(
        lambda: frozen(images.pre_activation(nn.BatchNorm2d, depth=1), "1.body.0.weight", "1.body.3.weight"), _image
    ),
    "frozen bias in front of a normalization": Case(lambda: frozen(chain(3, 5, 4, norm=True), "0.bias"), _row),
    "frozen convolution bias in front of a normalization": Case(
        lambda: frozen(images.post_activation(bias=True), "0.bias", "3.body.0.bias"), _image
    ),
    "frozen bias elsewhere": Case(lambda: frozen(chain(3, 5, 4, 3), "0.bias", "4.bias"), _row),
    "frozen weight": Case(lambda: frozen(chain(3, 5, 4, 3, 3), "2.weight"), _row),
    "frozen convolution": Case(lambda: frozen(images.post_activation(bias=True), "3.body.0.weight"), _image),
    "frozen weights, trained biases": Case(lambda: frozen(images.separable(nn.ReLU), "weight"), _image),
    "frozen LayerNorm biases": _language(lambda: frozen(transformer(), "body.0.bias", "key.bias")),
    "evaluation mode": Case(lambda: images.pre_activation(nn.BatchNorm2d, bias=True, depth=1).eval(), _image),
    "detached norm": Case(lambda: modules.Detached(nn.Linear(3, 4), nn.ReLU()), _row),
    "loss of the direction": Case(lambda: chain(3, 4, 3), _row, modules.scale_of_last),
    "two outputs": Case(modules.TwoOutputs, _row),
    "two activations": Case(
        lambda: nn.Sequential(
            nn.Linear(3, 4), Function(lambda x: torch.cat([x.relu(), (-x).relu()], -1)), nn.Linear(8, 2)
        ),
        _row,
    ),
}
