"""Models whose batch normalizations can be folded, and checks of the folded model."""

import torch
from torch import nn

from lightning_normgeo.robustness import FoldedModel
from support.small_models import worn


def images(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seen(net, x):
    """Return logits, and their gradient with respect to the images along a fixed direction."""
    x = x.clone().requires_grad_()
    logits = net(x)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), x)
    return logits.detach(), gradient


def folds(net, x, tolerance=1e-12, channels_last=True):
    """Fold, check that the function is the same, and return the names of the folded layers."""
    expected = seen(net, x)
    folded = FoldedModel(net, net, x, channels_last)
    with folded.active():
        found = seen(net, x)
    for value, before in zip(found, expected, strict=True):
        assert (value - before).abs().max() <= tolerance * before.abs().max()
    return set(folded.folded)


def net_of(*layers, dtype=torch.float64):
    return worn(nn.Sequential(*layers)).to(dtype).eval()
