"""Benchmark of BatchGeometryMonitor: a measured step against the same step without it, and its peak memory.

Run it as a plain script: ``python benchmarks/batch_geometry.py [--arch resnet18] [--stem cifar] [--batch 64]
[--rounds 6]``. Steps with and without the measured work alternate within one fit, on one thread, and processor time is
counted: quote ratios, not seconds. Other tables compare Σ_X Z by one convolution and one gradient with unfolded
patches, and give the memory of one layer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from results import Result
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import BatchGeometryMonitor, ResNetClassifier
from lightning_normgeo.geometry import PatchMap, covariance, covariance_product, input_geometry

_CADENCE = 50
_QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
_WARM = 4


class Start(pl.Callback):
    """First callback of a fit: starts the timer. Every second step does the measured work."""

    def __init__(self) -> None:
        self.began = 0.0
        self.times: dict[bool, list[float]] = {True: [], False: []}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.began = time.process_time()


class End(pl.Callback):
    """Last callback of a fit: stops the timer."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        took = time.process_time() - self.start.began
        if batch_idx >= _WARM:
            self.start.times[batch_idx % 2 == 1].append(took)


def steps(options: argparse.Namespace, **settings: Any) -> tuple[float, float]:
    """Return the median seconds of a step that is not measured, and of one that is."""
    pl.seed_everything(0, verbose=False)
    settings_of_sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}
    network = ResNetClassifier(arch=options.arch, norm="bn", stem=options.stem, optimizer=settings_of_sgd)
    count = 2 * options.rounds + _WARM
    images = torch.rand(options.batch, 3, options.size, options.size)
    data = TensorDataset(images.repeat(count, 1, 1, 1), torch.zeros(count * options.batch, dtype=torch.long))
    start = Start()
    trainer = pl.Trainer(
        callbacks=[start, BatchGeometryMonitor(2, **settings), End(start)], max_epochs=1, accelerator="cpu", **_QUIET
    )
    trainer.fit(network, DataLoader(data, batch_size=options.batch))
    return statistics.median(start.times[False]), statistics.median(start.times[True])


def training(options: argparse.Namespace) -> Result:
    """Return the table of measured steps."""
    rows = []
    cases: dict[str, dict[str, Any]] = {
        "first residual block (default)": {},
        "16 layers": {"layers": ["*layer1*conv*", "*layer2*conv*", "*layer3*conv*", "*layer4*conv*"]},
    }
    for name, settings in cases.items():
        bare, measured = steps(options, **settings)
        more = measured - bare
        rows.append((name, f"{1e3 * more:.0f}", f"{more / bare:.1%}", f"{more / bare / _CADENCE:.2%}"))
    title = f"{options.arch}, {options.stem} stem, {options.batch} images of {options.size}²: a step takes {bare:.2f} s"
    return Result(title, ("layers", "ms more", "of the step", f"each {_CADENCE}th step"), rows)


def memory(options: argparse.Namespace) -> Result:
    """Return the table of the memory that the measurement of one layer needs beside its input."""
    rows = []
    for channels, size, batch in ((64, 32, 64), (256, 8, 64), (512, 4, 64), (512, 4, 4)):
        layer = PatchMap((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
        x, weight = torch.rand(batch, channels, size, size), torch.rand(channels, 9 * channels)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            exact = input_geometry(x, layer, weight).exact
        held = peak = 0
        for event in found.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        own = x.numel() * x.element_size()
        mib, shape = 2**20, f"{batch}×{channels}×{size}²"
        rows.append((shape, "yes" if exact else "no", f"{own / mib:.1f}", f"{peak / mib:.0f}"))
    return Result("Peak memory of one 3×3 layer", ("input", "exact", "MiB of the input", "MiB more at the peak"), rows)


def products(options: argparse.Namespace) -> Result:
    """Return the table of the product of Σ_X with 16 vectors, against that by unfolded patches."""
    rows = []
    for channels, size, batch in ((64, 32, 8), (256, 8, 32), (512, 4, 32)):
        layer = PatchMap((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
        x = layer.padded(torch.rand(batch, channels, size, size))
        z = torch.randn(1, 16, 9 * channels)
        times = {"map": [], "unfolded": []}
        for _ in range(options.rounds):
            began = time.process_time()
            ours = covariance_product(x, z, layer)
            times["map"].append(time.process_time() - began)
            began = time.process_time()
            theirs = z[0] @ covariance(layer.columns(x)[0].float())
            times["unfolded"].append(time.process_time() - began)
        error = float((ours[0] - theirs).norm() / theirs.norm())
        short, long = (1e3 * statistics.median(one) for one in times.values())
        rows.append((str(9 * channels), f"{short:.1f}", f"{long:.1f}", f"{long / short:.0f}", f"{error:.0e}"))
    return Result("Σ_X Z for 16 vectors", ("n", "ms", "ms unfolded", "ratio", "difference"), rows)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--stem", default="cifar")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for make in (products, memory, training):
        make(options).put(Console(), options.markdown)


if __name__ == "__main__":
    main(sys.argv[1:])
