"""Small classifiers, and images for them."""

import torch
from torch import nn


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def two_classes(w):
    """Return logits (0, w·x): the loss of label 0 increases along sign(w)."""
    return lambda x: torch.stack([torch.zeros(len(x), dtype=x.dtype), x.flatten(1) @ w], 1)


def conv_net(seed=0, dtype=torch.float32):
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    body = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 8, 3, stride=2), nn.Flatten())
    net = nn.Sequential(nn.Sequential(*body), nn.Linear(8 * 3 * 3, 5))
    torch.set_rng_state(torch_state)
    return net.to(dtype).eval()
