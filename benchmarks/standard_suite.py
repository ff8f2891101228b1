"""Benchmark of AutoAttack's standard suite against torchattacks, and against the authors' code if it is at hand.

Run it as a plain script: ``python benchmarks/standard_suite.py --weights FILE [--images FILE] [--official FOLDER]``.
FILE has a state dictionary of :class:`Network`, and images with their labels; without them a network is trained on
structured noise for a minute. FOLDER is a checkout of the authors' repository. All evaluate the same images with the
published settings (100 steps, 9 targets, 5000 queries); torchattacks' own AutoAttack has 10 steps, so its parts are
put together with 100. Seconds are of one round: quote ratios.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from results import Result
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import evaluate_robustness
from robustness import structured

CLASSES = 10


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.c2, self.b2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.sc: nn.Module = nn.Identity()
        if inputs != outputs:
            self.sc = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation behind the sum."""
        y = F.relu(self.b1(self.c1(x)))
        return F.relu(self.b2(self.c2(y)) + self.sc(x))


class Network(nn.Sequential):
    """A residual network of eight layers for images of 32 × 32 pixels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width, width, 1),
            Block(width, 2 * width, 2),
            Block(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, CLASSES),
        )


def train(net: nn.Module, steps: int = 150) -> None:
    """Train on structured noise."""
    images, labels = structured(64 * steps, 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for x, y in zip(images.split(64), labels.split(64), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def ours(net: nn.Module, x: Tensor, y: Tensor, options: Any) -> Tensor:
    """Return which images stay right under the suite of this package."""
    loader = DataLoader(TensorDataset(x, y), options.batch)
    report = evaluate_robustness(net, loader, attacks="standard", eps=options.eps / 255, progress=False)
    return report.decisions.of("standard").correct


def with_torchattacks(net: nn.Module, x: Tensor, y: Tensor, options: Any) -> Tensor:
    """Return which images stay right under torchattacks' parts with the published settings."""
    import torchattacks as ta

    ball, out = {"eps": options.eps / 255, "norm": "Linf", "seed": 0}, []
    parts = [
        ta.APGD(net, **ball, steps=100, loss="ce"),
        ta.APGDT(net, **ball, steps=100, n_classes=CLASSES),
        ta.FAB(net, **ball, steps=100, multi_targeted=True, n_classes=CLASSES),
        ta.Square(net, **ball, n_queries=5000),
    ]
    for images, labels in zip(x.split(options.batch), y.split(options.batch), strict=True):
        left = torch.arange(len(labels))
        for part in parts:
            with torch.no_grad():
                left = left[net(images[left]).argmax(1) == labels[left]]
            if not len(left):
                break
            attacked = part(images[left], labels[left])
            with torch.no_grad():
                left = left[net(attacked).argmax(1) == labels[left]]
        out.append(torch.isin(torch.arange(len(labels)), left))
    return torch.cat(out)


def official(net: nn.Module, x: Tensor, y: Tensor, options: Any) -> Tensor:
    """Return which images stay right under the authors' code."""
    sys.path.insert(0, options.official)
    from autoattack import AutoAttack

    suite = AutoAttack(net, norm="Linf", eps=options.eps / 255, version="standard", device="cpu", verbose=False)
    attacked = suite.run_standard_evaluation(x, y, bs=options.batch)
    with torch.no_grad():
        return net(attacked).argmax(1) == y


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="state dictionary of the network")
    parser.add_argument("--images", help="file of torch with images in [0, 1] and labels")
    parser.add_argument("--official", help="checkout of the authors' code")
    parser.add_argument("--count", type=int, default=100, help="number of images")
    parser.add_argument("--batch", type=int, default=100, help="images per batch of the loader")
    parser.add_argument("--eps", type=float, default=8.0, help="radius in 255ths")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    net = Network()
    if options.weights:
        net.load_state_dict(torch.load(options.weights, weights_only=True))
    else:
        train(net)
    images, labels = torch.load(options.images, weights_only=True) if options.images else structured(options.count, 1)
    x, y = images[: options.count], labels[: options.count]
    net.eval()
    contenders: dict[str, Callable[..., Tensor]] = {"torchattacks, 100 steps": with_torchattacks, "ours": ours}
    if options.official:
        contenders = {"AutoAttack, the authors' code": official, **contenders}
    with torch.no_grad():
        clean = net(x).argmax(1) == y
    times, right = {}, {}
    for name, contender in contenders.items():
        start = time.perf_counter()
        right[name] = contender(net, x, y, options)
        times[name] = time.perf_counter() - start
    rows = [
        (
            name,
            f"{times[name]:.1f}",
            f"{times[name] / times['ours']:.2f}",
            str(int(right[name].sum())),
            str(int((right[name] != right["ours"]).sum())),
        )
        for name in contenders
    ]
    title = f"AutoAttack standard, eps {options.eps:g}/255, {len(y)} images, {int(clean.sum())} of them right"
    result = Result(title, ("", "s", "over ours", "robust", "decisions that differ from ours"), rows)
    if options.markdown:
        print(f"{result.markdown()}\n{options.threads} threads, torch {torch.__version__}")
    else:
        result.show(Console())


if __name__ == "__main__":
    main()
