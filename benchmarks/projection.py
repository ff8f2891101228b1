"""Benchmark of SphereProjection: a projection after each optimizer step, over the whole training step.

Run it as a plain script: ``python benchmarks/projection.py``. It trains torchvision's ResNets on random images of 32×32
pixels, and prints the processor time of a training step and of the projection behind it on one thread, and their ratio.
The stem for ImageNet makes a step cheap, and the ratio large; that for CIFAR is the usual one for such images.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torchvision
from torch import nn

from lightning_normgeo import scale_symmetries
from lightning_normgeo.symmetries import Spheres

ROUNDS = 4


def network(name: str, stem: str) -> nn.Module:
    """Return a ResNet for ten classes, with the stem of ImageNet or CIFAR."""
    torch.manual_seed(0)
    found: Any = getattr(torchvision.models, name)(num_classes=10)
    if stem == "CIFAR":
        found.conv1, found.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return found.train()  # type: ignore[no-any-return]


def measure(name: str, stem: str, batch: int) -> None:
    """Print the times of one network."""
    model = network(name, stem)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    spheres = Spheres(scale_symmetries(model, images[:2]), model)
    steps, projections = [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        middle = time.process_time()
        spheres.project(optimizer)
        steps.append(middle - start)
        projections.append(time.process_time() - middle)
    step, projection = statistics.median(steps), statistics.median(projections)
    elements = sum(p.numel() for p in model.parameters())
    print(
        f"{name}, {stem} stem, batch {batch}: {elements / 1e6:.1f} M parameters, {len(spheres):,} blocks, "
        f"step {step:.3f} s, projection {projection:.3f} s, {projection / step:.2%} of the step"
    )


def main() -> None:
    torch.set_num_threads(1)
    for stem, batch in (("ImageNet", 128), ("CIFAR", 64)):
        for name in ("resnet18", "resnet101"):
            measure(name, stem, batch)


if __name__ == "__main__":
    main()
