"""Benchmark of effective weights: the whole measurement of a network against one of its training steps.

Run it as a plain script: ``python benchmarks/effective_weights.py``. On one thread, it alternates training steps of 64
images and measurements by ``effective_weights`` with 30 Lanczos steps, and prints the processor time of each and their
ratio; then the largest relative residual of a spectral norm, and the largest error against 200 steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_normgeo import effective_weights
from lightning_normgeo.models.architecture import build_resnet

NETWORKS = (("resnet18", "imagenet"), ("resnet18", "cifar"), ("resnet101", "imagenet"))
ROUNDS = 3


def timed(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(arch: str, stem: str) -> None:
    network: nn.Module = build_resnet(arch, "bn", stem, 10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images, labels = torch.rand(64, 3, 32, 32), torch.randint(10, (64,))

    def train() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()

    train()
    times = [(timed(train), timed(lambda: effective_weights(network, images))) for _ in range(ROUNDS)]
    step, whole = (statistics.median(column) for column in zip(*times, strict=True))
    found, exact = (effective_weights(network, images, steps=steps) for steps in (30, 200))
    norms = [
        (a.effective_spectral_norm, b.effective_spectral_norm)
        for a, b in zip(found, exact, strict=True)
        if a.effective_spectral_norm and b.effective_spectral_norm
    ]
    residual = max(a.residual / a.value for a, _ in norms)
    error = max(1 - a.value / b.value for a, b in norms)
    print(
        f"{arch}, {stem} stem: a training step {step:.2f} s, effective weights {whole:.2f} s, {whole / step:.1f} times "
        f"as much; largest relative residual {residual:.1e}, largest error against 200 steps {error:.1e}"
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for arch, stem in NETWORKS:
        measure(arch, stem)


if __name__ == "__main__":
    main()
