"""What the monitors cost: on a step that is not measured, and on one that is.

Run it as a plain script: ``python benchmarks/geometry.py [--arch resnet101] [--batch 64] [--rounds 5]``. Everything is
measured side by side in one process; quote ratios, not milliseconds.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer import call
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor, ResNetClassifier
from lightning_normgeo._lightning import BATCH_HOOKS
from lightning_normgeo.normalization.names import named_weights

_CALLS = 100


def median_ms(function: Callable[[], Any], rounds: int) -> float:
    """Return the median time of a call in milliseconds, after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


class UnmeasuredStep(pl.Callback):
    """In the middle of a fit, times everything that happens per batch because of the callbacks."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.microseconds: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 2:
            return
        ours, optimizer = [callback for callback in trainer.callbacks if callback is not self], trainer.optimizers[0]
        step_hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
        cases = {
            "none": ([], []),
            "three callbacks without a hook": ([pl.Callback() for _ in range(3)], []),
            "three monitors": (ours, step_hooks),
        }
        everyone, times = trainer.callbacks, {name: [] for name in cases}
        for _ in range(10 * self.rounds):  # in turn, so that the machine's drift hits all
            for name, (callbacks, hooks) in cases.items():
                trainer.callbacks = callbacks
                times[name].append(self._dispatch(trainer, batch, outputs, optimizer, hooks))
        trainer.callbacks = everyone
        self.microseconds = {name: 1e6 * statistics.median(values) for name, values in times.items()}

    @staticmethod
    def _dispatch(trainer: Any, batch: Any, outputs: Any, optimizer: Any, step_hooks: list[Any]) -> float:
        arguments = {
            "on_train_batch_start": (batch, 3),
            "on_train_batch_end": (outputs, batch, 3),
            "on_after_backward": (),
        }
        start = time.perf_counter()
        for _ in range(_CALLS):
            for hook in BATCH_HOOKS:
                call._call_callback_hooks(trainer, hook, *arguments.get(hook, (None,)))
            for step_hook in step_hooks:
                step_hook(optimizer, (optimizer,), {})
        return (time.perf_counter() - start) / _CALLS


class StepTimes(pl.Callback):
    """Times whole training steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(time.perf_counter() - self.start)


def monitors(every: int) -> list[Any]:
    """Return all three monitors."""
    return [OrthogonalityMonitor(every), NormGrowthMonitor(every), AffineConvergenceMonitor(every)]


def fit(arch: str, batch: int, steps: int, callbacks: list[Any]) -> ResNetClassifier:
    """Train a few steps on random images."""
    torch.manual_seed(0)
    settings = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}
    model = ResNetClassifier(arch=arch, stem="imagenet", optimizer=settings)
    data = TensorDataset(torch.rand(batch * steps, 3, 32, 32), torch.randint(10, (batch * steps,)))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", **quiet).fit(model, DataLoader(data, batch))
    return model


def step_ms(arch: str, batch: int, rounds: int, callbacks: list[Any]) -> float:
    """Return the median time of a training step, without the first two."""
    times = StepTimes()
    fit(arch, batch, rounds + 2, [times, *callbacks])
    return 1e3 * statistics.median(times.times[2:])


def floor_ms(model: ResNetClassifier, rounds: int) -> float:
    """Return the time to read every weight and gradient once."""
    tensors = [
        tensor.flatten() for _, weight in named_weights(model) for tensor in (weight.detach(), weight.detach().clone())
    ]
    return median_ms(lambda: [tensor.sum() for tensor in tensors], rounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet101")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    unmeasured = UnmeasuredStep(options.rounds)
    model = fit("resnet18", 4, 4, [unmeasured, *monitors(every=1000)])
    base = unmeasured.microseconds["none"]
    table = Table(title="A step that is not measured: callbacks and optimizer hooks, µs")
    for column in ("callbacks", "µs per step", "more than without"):
        table.add_column(column, justify="right")
    for name, value in unmeasured.microseconds.items():
        table.add_row(name, f"{value:.1f}", f"{value - base:.1f}")
    console = Console(width=110)
    console.print(table)

    bare, measured = [], []
    for _ in range(3):  # in turn, so that the machine's drift hits both
        bare.append(step_ms(options.arch, options.batch, options.rounds, []))
        measured.append(step_ms(options.arch, options.batch, options.rounds, monitors(every=1)))
    model = ResNetClassifier(arch=options.arch, stem="imagenet")
    floor = floor_ms(model, options.rounds)
    more = statistics.mean(measured) - statistics.mean(bare)
    table = Table(title=f"A measured step: {options.arch}, batch {options.batch}, 32×32, imagenet stem")
    for column in ("", "ms", "ratio"):
        table.add_column(column, justify="right")
    table.add_row("training step", f"{statistics.mean(bare):.0f}", "1")
    table.add_row(
        "with all three monitors, measured",
        f"{statistics.mean(measured):.0f}",
        f"{1 + more / statistics.mean(bare):.2f}",
    )
    table.add_row("the measurement", f"{more:.0f}", f"{more / floor:.1f} × reading all weights and gradients once")
    table.add_row("measured each 50th step", "", f"{100 * more / 50 / statistics.mean(bare):.2f} % of training")
    console.print(table)
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
