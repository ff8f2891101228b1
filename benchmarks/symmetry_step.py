"""Benchmark of a measured step: all scale symmetries against the same parameters as single units.

Run it as a plain script: ``python benchmarks/symmetry_step.py``. It alternates optimizer steps of torchvision's
ViT-B/16 that nobody observes, that are measured for the norm growth of single weights, and that are measured for scale
symmetries, and prints the processor time of each and their ratio, on one thread. Forward and backward passes, which are
the same for all, are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torchvision

from lightning_normgeo.normalization.autograd.tracing import traced_graph
from lightning_normgeo.normalization.names import by_clean_name, named_weights
from lightning_normgeo.probes.step_probe import StepProbe
from lightning_normgeo.probes.symmetries.probe import SymmetryProbe
from lightning_normgeo.probes.weight_step import Observed
from lightning_normgeo.symmetries import WeightUnits
from lightning_normgeo.symmetries.search import symmetries_in

ROUNDS = 7


def timed(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = torchvision.models.vit_b_16(image_size=32).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images = torch.randn(2, 3, 32, 32)
    graph = traced_graph(network, images)
    symmetries = SymmetryProbe()
    symmetries.read(network, symmetries_in(graph, network))
    network(images).logsumexp(1).sum().backward()
    parameters = by_clean_name(network.named_parameters())
    weights = [
        Observed(WeightUnits(name=name, kind="none", count=weight.shape[0], reason="of the benchmark"), weight)
        for name, weight in named_weights(network)
    ]

    def plain() -> None:
        optimizer.step()

    reader = StepProbe()
    reader.weights = weights
    reader.attach([optimizer])

    def single() -> None:
        reader.arm(updates=True)
        optimizer.step()
        reader.collect()

    def joint() -> None:
        symmetries.before(optimizer)
        optimizer.step()
        symmetries.after()
        found = symmetries.collect()
        if found is None:
            raise RuntimeError("nothing was measured")
        float(found.charge.abs().max())

    steps = {"nobody": plain, "single units": single, "symmetries": joint}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(timed(step))
    middle = {name: statistics.median(found[1:]) for name, found in times.items()}
    print(f"{len(parameters)} parameters, {sum(p.numel() for p in parameters.values()):,} elements, one thread")
    for name, seconds in middle.items():
        print(f"{name:>14}: {seconds:.3f} s")
    print(f"symmetries / single units: {middle['symmetries'] / middle['single units']:.2f}")


if __name__ == "__main__":
    main()
