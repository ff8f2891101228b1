"""Benchmark of the first measured step, in which the graph is searched, against training steps without callbacks.

Run it as a plain script: ``OMP_NUM_THREADS=1 python benchmarks/first_step.py [--markdown] [--only gpt]``. Fits with
and without callbacks alternate, and times are those of the CPU: quote ratios, not seconds. Networks are deep rather
than wide, so that a training step is short and the search is long.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from results import Result
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import (
    AffineConvergenceMonitor,
    BatchGeometryMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    SymmetryMonitor,
)

_STEPS = 5
_BATCH = 8
_QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Residual(nn.Module):
    """A module beside the identity."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


class Unrolled(nn.Module):
    """A recurrent network written as a loop, with layer normalization: a graph of many nodes and few parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state = nn.Linear(16, 128), nn.Linear(32, 128)
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(len(x), 32)
        for t in range(x.shape[1]):
            i, f, g, o = self.norm(self.inputs(x[:, t]) + self.state(hidden)).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        return self.head(hidden)


def deep(layers: int) -> nn.Module:
    """Return a residual network of narrow layers with batch normalization."""
    blocks = (nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(layers))
    return nn.Sequential(*(Residual(block) for block in blocks), nn.Linear(8, 10))


def transformer() -> nn.Module:
    """Return a transformer of 24 layers with a classifier on all tokens."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(16 * 128, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet152": (lambda: torchvision.models.resnet152(num_classes=10), (3, 64, 64)),
    "densenet201": (lambda: torchvision.models.densenet201(num_classes=10), (3, 64, 64)),
    "transformer, 24 layers": (transformer, (16, 128)),
    "LSTM, 512 steps in a loop": (Unrolled, (512, 16)),
    "750 narrow layers": (lambda: deep(750), (8,)),
    "1,500 narrow layers": (lambda: deep(1500), (8,)),
}


class Project(pl.LightningModule):
    """A classifier under SGD."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-5, momentum=0.9)


class Ends(pl.Callback):
    """Times at which steps end, in seconds of the CPU."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.times.append(time.process_time())


def monitors() -> list[Any]:
    """Return all monitors, measuring at every step."""
    single = [OrthogonalityMonitor(1), NormGrowthMonitor(1, cumulative=True), AffineConvergenceMonitor(1)]
    return [*single, BatchGeometryMonitor(1), SymmetryMonitor(1)]


def seconds(network: nn.Module, shape: tuple[int, ...], callbacks: list[Any]) -> list[float]:
    """Return the time of each step of a fit; that of the first contains the start of the fit."""
    data = TensorDataset(torch.rand(_BATCH * _STEPS, *shape), torch.randint(10, (_BATCH * _STEPS,)))
    project, ends = Project(network), Ends()
    trainer = pl.Trainer(
        max_steps=_STEPS, callbacks=[*callbacks, ends], logger=False, accelerator="cpu", devices=1, **_QUIET
    )
    began = time.process_time()
    trainer.fit(project, DataLoader(data, _BATCH))
    return [after - before for before, after in itertools.pairwise([began, *ends.times])]


def row(name: str, rounds: int) -> tuple[str, ...]:
    """Return the row of a network: medians over rounds in which fits with and without callbacks alternate."""
    make, shape = NETWORKS[name]
    found = []
    for _ in range(rounds):
        bare, observed = (seconds(make(), shape, callbacks) for callbacks in ([], monitors()))
        step = statistics.median(bare[1:])
        found.append((step, observed[0] - bare[0], (observed[0] - bare[0]) / step, min(observed[2:]) / step))
    step, more, steps, later = (statistics.median(column) for column in zip(*found, strict=True))
    return name, f"{1e3 * step:.0f}", f"{more:.1f}", f"{steps:.0f}", f"{later:.1f}"


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="text in the names of the networks; default: all")
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seconds(deep(4), (8,), monitors())  # imports, and the compiled loops of numba
    rows = [row(name, options.rounds) for name in NETWORKS if options.only in name]
    columns = ("network", "ms per step", "s more in the first", "in steps", "a later measured step, in steps")
    result = Result("All monitors, each step measured", columns, rows)
    result.put(Console(width=120), options.markdown)


if __name__ == "__main__":
    main()
