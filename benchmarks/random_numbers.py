"""Benchmark of the random numbers of attacks: counter-based ones against a generator of torch for each sample.

Run it as a plain script: ``python benchmarks/random_numbers.py [--device cuda] [--rounds 9]``. In turn it draws
Gaussian noise and random starts with one ``torch.Generator`` on the host for each sample, with this package as it is,
and with this package by torch alone, without numba's loops; and prints the shortest time for each number and its ratio
to that of the generators. On a CPU it is processor time. Quote ratios, not nanoseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from results import Result
from rich.console import Console
from torch import Tensor

from lightning_normgeo.geometry.products import compiled
from lightning_normgeo.robustness import Ball, gaussian_noise
from lightning_normgeo.robustness.attacks.random_numbers import counter_random
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import generator

SHAPES = ((256, 1, 8, 8), (256, 3, 32, 32), (64, 3, 224, 224))
BALLS = {norm: Ball(norm, 0.1, 0.0, 1.0) for norm in ("linf", "l2")}


def noise_of_generators(images: Tensor) -> Tensor:
    draws = [torch.randn(images.shape[1:], generator=generator(0, k)) for k in range(len(images))]
    return (images + 0.05 * torch.stack(draws).to(images.device)).clamp(0, 1)


def start_of_generators(images: Tensor, norm: str) -> Tensor:
    ball, points = BALLS[norm], []
    for k in range(len(images)):
        draws = generator(0, k, 1)
        if norm == "linf":
            points.append(torch.rand(images.shape[1:], generator=draws) * 2 - 1)
        else:
            direction = torch.randn(images.shape[1:], generator=draws)
            points.append(direction / direction.norm() * torch.rand((), generator=draws))
    return ball.project(images + ball.eps * torch.stack(points).to(images.device), images)


DRAWS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "noise": (noise_of_generators, lambda x: gaussian_noise(x, 0.05, 0, range(len(x)), (0.0, 1.0))),
    "start, l∞": (
        lambda x: start_of_generators(x, "linf"),
        lambda x: BALLS["linf"].sample(x, 0, range(len(x))),
    ),
    "start, l2": (
        lambda x: start_of_generators(x, "l2"),
        lambda x: BALLS["l2"].sample(x, 0, range(len(x))),
    ),
}


@contextmanager
def without_loops() -> Iterator[None]:
    failed = compiled._failed.copy()
    compiled._failed.add(counter_random._LOOPS)
    try:
        yield
    finally:
        compiled._failed.clear()
        compiled._failed.update(failed)


def seconds(draw: Callable[[Tensor], Tensor], images: Tensor) -> float:
    if not images.is_cuda:
        began = time.process_time()
        draw(images)
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    draw(images)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def row(name: str, shape: tuple[int, ...], device: str, rounds: int) -> tuple[str, ...]:
    """Return the nanoseconds for each number, and the ratios to those of the generators, of one draw."""
    images = torch.rand(shape, device=device)
    old, new = DRAWS[name]
    ways = ((old, nullcontext), (new, nullcontext), (new, without_loops))
    times: list[list[float]] = [[], [], []]
    for turn in range(rounds + 1):
        for spent, (draw, context) in zip(times, ways, strict=True):
            with context():
                found = seconds(draw, images)
            if turn:  # the first one warms up
                spent.append(found)
    base, ours, plain = (min(spent) / images.numel() * 1e9 for spent in times)
    batch = " × ".join(map(str, shape))
    return name, batch, f"{base:.2f}", f"{ours:.2f}", f"{ours / base:.2f}", f"{plain:.2f}", f"{plain / base:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="print the table for a document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = ("", "batch", "generators, ns", "ours, ns", "ratio", "by torch, ns", "ratio")
    rows = [row(name, shape, options.device, options.rounds) for name in DRAWS for shape in SHAPES]
    result = Result(f"Random numbers on {options.device}, {options.threads} threads", columns, rows)
    result.put(Console(width=120), options.markdown)


if __name__ == "__main__":
    main()
