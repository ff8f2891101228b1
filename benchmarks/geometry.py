"""Benchmark of the monitors against other ways to watch weights and gradients during training.

Run it as a plain script: ``python benchmarks/geometry.py [--arch resnet101] [--batch 64] [--rounds 20]
[--only monitors] [--without-numba] [--cpu-time]``. Steps with and without the measured work alternate within one fit.
The floor, reading every weight and gradient once, is timed between them: quote ratios, not milliseconds. So is what a
measured step has to touch with all monitors: weight, gradient and state, a copy of the weight, and both after the step.
On a GPU every time includes waiting for the device.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.trainer import call
from pytorch_lightning.utilities import grad_norm
from results import Result
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor, ResNetClassifier
from lightning_normgeo._lightning import BATCH_HOOKS
from lightning_normgeo.normalization.names import named_weights

_CALLS = 100
_CADENCE = 50
_QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
OPTIMIZERS = {
    # larger rates blow up the weights on four images a batch; updates are then almost radial, and read twice
    "SGD, momentum": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-5, "momentum": 0.9}},
    "AdamW": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4, "weight_decay": 0.01}},
}


_clock = time.perf_counter


def now() -> float:
    """Wait until the GPU has finished all work; return the time in milliseconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * _clock()


def monitors(every: int) -> list[Any]:
    """Return all three monitors, measuring at every ``every``-th step."""
    return [OrthogonalityMonitor(every), NormGrowthMonitor(every), AffineConvergenceMonitor(every)]


class Start(pl.Callback):
    """First callback of a fit: starts the timer. Every second step, from the second on, does the measured work."""

    def __init__(self) -> None:
        self.began = 0.0
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.floors: list[float] = []
        self.touched: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.began = now()


class End(pl.Callback):
    """Last callback of a fit: stops the timer, then times the floor, and what a measured step has to touch."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.copies: dict[Any, Any] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        took = now() - self.start.began
        if batch_idx >= 4:  # the first steps allocate memory, compile and fill caches
            self.start.times[batch_idx % 2 == 1].append(took)
            began = now()
            for _, weight in named_weights(pl_module):
                weight.detach().sum()
                weight.grad.sum()
            self.start.floors.append(now() - began)
            began = now()
            self._touch(trainer.optimizers[0], [weight for _, weight in named_weights(pl_module)])
            self.start.touched.append(now() - began)

    def _touch(self, optimizer: Any, weights: list[Any]) -> None:
        """Copy W and read g and the state, then read W and its copy: 24 bytes an element for SGD, 28 for Adam."""
        for weight in weights:
            self.copies.setdefault(weight, torch.empty_like(weight, requires_grad=False)).copy_(weight.detach())
            weight.grad.sum()
            for value in optimizer.state[weight].values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    value.sum()
        for weight in weights:
            weight.detach().sum()
            self.copies[weight].sum()


class GradNorm(pl.Callback):
    """Gradient norms as Lightning's documentation logs them: self.log_dict(grad_norm(self, 2))."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.fit_loop.epoch_loop._batches_that_stepped % 2 == 1:
            pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class PlainLoop(pl.Callback):
    """Handwritten loop over the layers: cosine, norms, increment and angle, with one .item() for each value."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.fit_loop.epoch_loop._batches_that_stepped % 2 == 0:
            return
        values = {}
        for name, weight in named_weights(pl_module):
            w, g = weight.detach().flatten(1), weight.grad.flatten(1)
            self.before[name] = w.clone()
            values[f"cos/{name}"] = torch.nn.functional.cosine_similarity(w, g).abs().max().item()
            values[f"norm/{name}"], values[f"gradient/{name}"] = w.norm().item(), g.norm().item()
        trainer.logger.log_metrics(values)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        values = {}
        for name, weight in named_weights(pl_module) if self.before else ():
            w, new = self.before[name], weight.detach().flatten(1)
            values[f"increment/{name}"] = (new.norm() ** 2 - w.norm() ** 2).item()
            values[f"angle/{name}"] = torch.nn.functional.cosine_similarity(w, new).clamp(-1, 1).acos().mean().item()
        self.before.clear()
        if values:
            trainer.logger.log_metrics(values)


class Watch(pl.Callback):
    """W&B's histograms of weights and gradients: WandbLogger.watch(model, log="all")."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.logger.watch(pl_module.model, log="all", log_freq=2, log_graph=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.logger.experiment.unwatch(pl_module.model)


CASES: dict[str, Callable[[], list[Any]]] = {
    "all three monitors, per filter": lambda: monitors(2),
    "OrthogonalityMonitor": lambda: [OrthogonalityMonitor(2)],
    "NormGrowthMonitor": lambda: [NormGrowthMonitor(2)],
    "the same, cumulative, on an unmeasured step": lambda: [NormGrowthMonitor(10_000, cumulative=True)],
    "AffineConvergenceMonitor": lambda: [AffineConvergenceMonitor(2)],
    'WandbLogger.watch(log="all")': lambda: [Watch()],
    "log_dict(grad_norm(...))": lambda: [GradNorm()],
    "a plain loop over the layers": lambda: [PlainLoop()],
}


def fit(options: Any, optimizer: str, batch: int, steps: int, callbacks: list[Any], logger: Any) -> Start:
    """Train a few steps on random images; return the first callback, which holds the times in milliseconds."""
    torch.manual_seed(0)
    model = ResNetClassifier(arch=options.arch, stem="imagenet", optimizer=OPTIMIZERS[optimizer])
    data = TensorDataset(torch.rand(batch * steps, 3, 32, 32), torch.randint(10, (batch * steps,)))
    start = Start()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[start, *callbacks, End(start)],
        logger=logger,
        log_every_n_steps=1,
        devices=1,
        **quiet,
    )
    trainer.fit(model, DataLoader(data, batch))
    return start


class UnmeasuredStep(pl.Callback):
    """Times all callback and optimizer hooks of one batch, in the middle of a fit."""

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
        for _ in range(10 * self.rounds):  # alternating, so that drift of the machine's speed affects all cases equally
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
        start = _clock()
        for _ in range(_CALLS):
            for hook in BATCH_HOOKS:
                call._call_callback_hooks(trainer, hook, *arguments.get(hook, (None,)))
            for step_hook in step_hooks:
                step_hook(optimizer, (optimizer,), {})
        return (_clock() - start) / _CALLS


def unmeasured_table(rounds: int) -> Result:
    """Return the table of a step that is not measured."""
    unmeasured = UnmeasuredStep(rounds)
    data = TensorDataset(torch.rand(16, 3, 32, 32), torch.randint(10, (16,)))
    everyone = [unmeasured, *monitors(1000)]
    trainer = pl.Trainer(max_steps=4, callbacks=everyone, logger=False, accelerator="cpu", **_QUIET)
    trainer.fit(ResNetClassifier(arch="resnet18", stem="imagenet"), DataLoader(data, 4))
    base = unmeasured.microseconds["none"]
    rows = [(name, f"{value:.1f}", f"{value - base:.1f}") for name, value in unmeasured.microseconds.items()]
    title = "A step that is not measured: callbacks and optimizer hooks"
    return Result(title, ("callbacks", "µs per step", "more than without"), rows)


def measured_table(options: Any, optimizer: str, logger: Any) -> Result:
    """Return the table of a measured step and of the alternatives to the monitors."""
    bare = fit(options, optimizer, options.batch, 4 + options.rounds, [], logger)
    step = statistics.median(bare.times[True] + bare.times[False])
    title = (
        f"A measured step: {options.arch}, {optimizer}; a training step of {options.batch} images takes {step:.0f} ms"
    )
    rows = []
    for name, make in CASES.items():
        if options.only not in name:
            continue
        found = fit(options, optimizer, options.small, 4 + 2 * options.rounds, make(), logger)
        without, floor = found.times[False], statistics.median(found.floors)
        if "unmeasured" in name:  # then all steps do the same work: compare with a fit without callbacks
            without = fit(options, optimizer, options.small, 4 + 2 * options.rounds, [], logger).times[True]
        # of neighboring steps, between which the speed of the machine changes least
        more = statistics.median(a - b for a, b in zip(found.times[True], without, strict=False))
        share = "" if "unmeasured" in name else f"{100 * more / step / _CADENCE:.2f} %"
        rows.append((name, f"{more:.1f}", f"{more / floor:.1f}", f"{100 * more / step:.1f} %", share))
    touched = statistics.median(bare.touched)
    for name, time_of in (
        ("touching what a measured step has to touch", touched),
        ("reading all weights and gradients once (floor)", floor),
    ):
        rows.append((name, f"{time_of:.1f}", f"{time_of / floor:.1f}", f"{100 * time_of / step:.1f} %", ""))
    return Result(title, ("", "ms more", "× floor", "of the step", f"each {_CADENCE}th step"), rows)


def main() -> None:
    """Run the benchmark and print its tables."""
    global _clock
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet101")
    parser.add_argument("--batch", type=int, default=64, help="batch size of the step that costs are compared with")
    parser.add_argument("--small", type=int, default=4, help="batch size of the steps whose time difference is taken")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="text in the names of the cases that are timed; default: all")
    parser.add_argument("--without-numba", action="store_true", help="measure as if numba were not installed")
    parser.add_argument("--cpu-time", action="store_true", help="time of the CPU, for a machine that does other work")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    options = parser.parse_args()
    if options.cpu_time:
        _clock = time.process_time
    if options.without_numba:
        sys.modules["numba"] = None
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        logger = WandbLogger(save_dir=folder, offline=True, project="benchmark")
        results = [unmeasured_table(options.rounds)]
        results += [measured_table(options, optimizer, logger) for optimizer in OPTIMIZERS]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    machine = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Lightning {pl.__version__}"
    if options.markdown:
        print("\n".join(result.markdown() for result in results) + f"\n{machine}")
        return
    console = Console(width=120)
    for result in results:
        result.show(console)
    console.print(machine)


if __name__ == "__main__":
    main()
