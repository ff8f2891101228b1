"""Small networks for images, for tests of scale symmetries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.symmetry_parts import Function, Residual

CHANNELS = 2


class Head(nn.Module):
    """Average over all positions, and a linear map to three classes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2).mean(2))


def conv(inputs: int, outputs: int, size: int = 3, **options: object) -> nn.Conv2d:
    """Return a convolution that keeps height and width."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)  # type: ignore[arg-type]


def pre_activation(norm: Callable[[int], nn.Module], bias: bool = False, width: int = 4, depth: int = 2) -> nn.Module:
    """Return a residual network with a normalization in front of each convolution."""
    blocks = [
        Residual(
            norm(width), nn.ReLU(), conv(width, width, bias=bias), norm(width), nn.ReLU(), conv(width, width, bias=bias)
        )
        for _ in range(depth)
    ]
    return nn.Sequential(conv(CHANNELS, width, bias=bias), *blocks, norm(width), nn.ReLU(), Head(width))


def post_activation(bias: bool = False, width: int = 4) -> nn.Module:
    """Return a residual network with a batch normalization behind each convolution, one of them with groups."""
    body = Residual(
        conv(width, width, bias=bias),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        conv(width, width, bias=bias, groups=2),
        nn.BatchNorm2d(width),
    )
    stem = [conv(CHANNELS, width, bias=bias), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, body, nn.ReLU(), Head(width))


class Twice(nn.Module):
    """A layer that is applied twice, with a function between."""

    def __init__(self, layer: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.layer, self.between = layer, between

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.between(self.layer(x)))


def mixed() -> nn.Module:
    """Return a network with weight normalization, a grouped transposed convolution, and a layer used twice."""
    return nn.Sequential(
        conv(CHANNELS, 4),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(conv(4, 4)),
        nn.LeakyReLU(),
        nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
        nn.GroupNorm(3, 6),
        nn.ReLU(),
        Twice(nn.Conv2d(6, 6, 1, bias=False), nn.ReLU()),
        nn.BatchNorm2d(6),
        nn.MaxPool2d(2),
        Head(6),
    )


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, and encoder layers; the class token is read in the end."""

    def __init__(self, width: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, width, 2, 2)
        self.token, self.positions = (nn.Parameter(torch.ones(1, count, width)) for count in (1, 5))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 2, 5, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(depth)
            )
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


class ImageAttention(nn.Module):
    """Attention between the positions of an image, with 1 × 1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.maps, self.output = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.maps(self.norm(x)).flatten(2).chunk(3, 1)
        weights = (query.transpose(1, 2) @ key * key.shape[1] ** -0.5).softmax(-1)
        return x + self.output((value @ weights.transpose(1, 2)).reshape(x.shape))


class UNet(nn.Module):
    """One step down and up, with attention at the bottom and a concatenation across."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(CHANNELS, width), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(width, width, 2, 2), ImageAttention(width))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 1))
        self.join = nn.Sequential(nn.GroupNorm(4, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.join(torch.cat([x, self.up(self.down(x))], 1))


class StandardizedConv2d(nn.Conv2d):
    """Convolution whose filters have mean 0 and variance 1."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        centered = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = centered / (centered.var((1, 2, 3), keepdim=True, correction=0) + self.eps).sqrt()
        return self._conv_forward(x, weight, self.bias)


class SqueezeExcitation(nn.Module):
    """Channels times a gate that is computed from their averages."""

    def __init__(self, width: int, gate: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.up(F.relu(self.down(squeezed))))


def separable(function: type[nn.Module], norm: bool = True) -> nn.Module:
    """Return a chain of depthwise and pointwise convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(CHANNELS, 4, 1)]
    for _ in range(2):
        layers += [conv(4, 4, groups=4), nn.BatchNorm2d(4) if norm else nn.Identity(), function(), nn.Conv2d(4, 4, 1)]
    return nn.Sequential(*layers, function(), Head(4))


def weight_normed(width: int = 4) -> nn.Module:
    """Return convolutions with the old and the new weight normalization of torch."""
    return nn.Sequential(
        old_weight_norm(conv(CHANNELS, width)),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(conv(width, width, groups=2)),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(conv(width, width), dim=1),
        nn.ReLU(),
        Head(width),
    )


def positions_normed() -> nn.Module:
    """Return convolutions, one with a norm for each position of the kernel, as wav2vec 2.0 embeds positions."""
    layer = nn.Conv1d(CHANNELS, 4, 3, groups=2)
    return nn.Sequential(nn.utils.parametrizations.weight_norm(layer, dim=2), nn.ReLU(), nn.Conv1d(4, 2, 1))


def old_weight_norm(layer: nn.Module) -> nn.Module:
    """Return a layer with the weight normalization of ``torch.nn.utils``, which torch plans to remove."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def standardized(width: int = 4) -> nn.Module:
    """Return convolutions with weight standardization, and a group normalization."""
    return nn.Sequential(
        StandardizedConv2d(CHANNELS, width, 3),
        nn.GroupNorm(2, width),
        nn.ReLU(),
        StandardizedConv2d(width, width, 1),
        Function(lambda x: F.relu(x).square()),
        Head(width),
    )


def spectral() -> nn.Module:
    """Return layers whose weights are divided by an estimate of their largest singular value."""
    layer = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(layer(conv(CHANNELS, 4)), nn.ReLU(), layer(conv(4, 4)), nn.ReLU(), Head(4)).eval()


def instance_normalized() -> nn.Module:
    """Return convolutions with instance normalizations."""
    return nn.Sequential(
        conv(CHANNELS, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(),
        conv(4, 4),
        nn.InstanceNorm2d(4),
        nn.PReLU(4),
        nn.Conv2d(4, 3, 1),
        nn.ReLU(),
        Head(3),
    )


def pooled() -> nn.Module:
    """Return convolutions with all kinds of pooling and with padding."""
    return nn.Sequential(
        nn.ZeroPad2d(1),
        nn.Conv2d(CHANNELS, 4, 3),
        nn.MaxPool2d(3, 1, padding=1),
        nn.ReflectionPad2d(1),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.ReplicationPad2d(1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.AdaptiveMaxPool2d(1),
        Head(4),
    )


def transposed() -> nn.Module:
    """Return transposed convolutions, with groups, biases and a batch normalization."""
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 4, 2, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.ReLU(),
        Head(2),
    )


def volumes() -> nn.Module:
    """Return convolutions of three dimensions, with a batch normalization."""
    return nn.Sequential(
        nn.Conv3d(1, 3, 2),
        nn.BatchNorm3d(3),
        nn.ReLU(),
        nn.Conv3d(3, 3, 1),
        nn.ReLU(),
        nn.MaxPool3d(2, 1),
        nn.Conv3d(3, 2, 1),
        nn.ReLU(),
        Head(2),
    )


def sequences() -> nn.Module:
    """Return convolutions of one dimension, dilated, with a layer normalization over time and channels."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv1d(4, 4, 1, groups=2),
        nn.LayerNorm([4, 4]),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(4, 3, 1),
        nn.ELU(),
        Head(3),
    )
