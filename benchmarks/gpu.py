"""Checks and measurements on a CUDA device: correctness, cost of measured steps, memory, kernels, and robustness.

Run it as a plain script: ``python benchmarks/gpu.py [--without-tests] [--rounds 20] [--write docs/reference/gpu.md]``.
It takes about five minutes and runs ``pytest -m gpu`` first. Where there is no CUDA device it says so, and runs the
tests that need none: the kernels in Triton's interpreter, and launches and transfers counted on fake CUDA tensors.
With ``--rehearse`` it then makes every table in small on the CPU, to find errors of this script before a GPU is lent.

Steps are timed in blocks, without waiting for the device in between, as users train: *ms* is the time of the fastest
block over its number of steps. Each network is trained with every choice of monitors, and bare before and after.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from results import Result
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.robustness import InputSpace, RobustnessEvaluator, RobustnessSettings

_WARM = 6
"""Steps before the clock starts: they allocate memory, compile kernels and fill caches."""
_BLOCKS = 3
_NEVER = 10**9
_ON_GPU = torch.cuda.is_available()
_DEVICE = "cuda" if _ON_GPU else "cpu"
_EMULATED = ["tests/geometry/products", "tests/callbacks/monitors/test_cuda_transfers.py"]


@dataclass(frozen=True)
class Case:
    """One training to time."""

    arch: str
    pixels: int
    batch: int
    precision: str
    optimizer: str
    channels_last: bool = False

    @property
    def title(self) -> str:
        """The case in words."""
        memory = ", channels last" if self.channels_last else ""
        return f"{self.arch}, {self.batch} images of {self.pixels} px, {self.precision}{memory}, {self.optimizer}"


CASES = [
    Case("resnet101", 32, 256, "32-true", "SGD"),
    Case("resnet101", 32, 256, "bf16-mixed", "AdamW, fused"),
    Case("resnet101", 224, 256, "bf16-mixed", "SGD", channels_last=True),
    Case("vit_b_16", 224, 128, "bf16-mixed", "AdamW, fused"),
]
REHEARSED = [
    Case("resnet18", 32, 2, "32-true", "SGD"),
    Case("resnet18", 32, 2, "bf16-mixed", "AdamW, fused", channels_last=True),
]
"""Cases that take seconds on a CPU."""
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-4),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
}
MONITORS: dict[str, Callable[[], list[Any]]] = {
    "bare": list,
    "three monitors, not measured": lambda: monitors(_NEVER),
    "three monitors, every step": lambda: monitors(1),
    "OrthogonalityMonitor, every step": lambda: [OrthogonalityMonitor(1)],
    "NormGrowthMonitor, every step": lambda: [NormGrowthMonitor(1)],
    "AffineConvergenceMonitor, every step": lambda: [AffineConvergenceMonitor(1)],
    "cumulative, not measured": lambda: [NormGrowthMonitor(_NEVER, cumulative=True)],
    "bare again": list,
}


def monitors(every: int) -> list[Any]:
    """Return the three monitors of the paper's claims."""
    return [OrthogonalityMonitor(every), NormGrowthMonitor(every), AffineConvergenceMonitor(every)]


class SameBatch(Dataset[Any]):
    """The same batch again and again, on the device already."""

    def __init__(self, case: Case, steps: int) -> None:
        x = torch.randn(case.batch, 3, case.pixels, case.pixels, device=_DEVICE)
        self.x = x.contiguous(memory_format=torch.channels_last) if case.channels_last else x
        self.y, self.steps = torch.randint(10, (case.batch,), device=_DEVICE), steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x, self.y


class Network(pl.LightningModule):
    """A classifier of torchvision."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        with torch.device(_DEVICE):
            net = torchvision.models.get_model(case.arch, num_classes=10)
        self.net = net.to(memory_format=torch.channels_last) if case.channels_last else net
        self.case = case

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.case.optimizer](self.parameters())


class Clock(pl.Callback):
    """Times blocks of steps after the first ones, waiting for the device at their ends only; then profiles a step."""

    def __init__(self, steps: int, profiled: bool) -> None:
        self.steps, self.profiled = steps, profiled
        self.block = max(1, steps // _BLOCKS)
        self.times: list[float] = []
        self.kernels = self.peak = 0

    @property
    def milliseconds(self) -> float:
        """The time of a step in the fastest block."""
        return 1e3 * min(b - a for a, b in itertools.pairwise(self.times)) / self.block

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        past = batch_idx - _WARM
        if past < 0:
            return
        if past % self.block == 0:
            _wait()
            self.times.append(time.perf_counter())
        if past == 0 and _ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        if past == self.steps:
            self.peak = torch.cuda.max_memory_allocated()
            if self.profiled:
                self.profiler = profile(activities=[ProfilerActivity.CUDA if _ON_GPU else ProfilerActivity.CPU])
                self.profiler.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if args[-1] == _WARM + self.steps and self.profiled:
            _wait()
            self.profiler.__exit__(None, None, None)
            self.kernels = sum(event.device_time > 0 for event in self.profiler.events())


def fit(case: Case, callbacks: list[Any], steps: int, profiled: bool) -> Clock:
    """Train a network and return the clock."""
    gc.collect()  # the network of the last training
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    clock = Clock(steps, profiled)
    trainer = pl.Trainer(
        max_steps=_WARM + steps + 1,
        accelerator="gpu" if _ON_GPU else "cpu",
        devices=1,
        precision=case.precision,  # type: ignore[arg-type]
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Network(case), DataLoader(SameBatch(case, _WARM + steps + 1), batch_size=None))
    return clock


def steps_table(case: Case, rounds: int, some: bool) -> Result:
    """Return the times of one training with each choice of monitors."""
    wanted = {n: m for n, m in MONITORS.items() if not some or n.startswith(("bare", "three", "cumulative"))}
    clocks = {name: fit(case, make(), rounds, profiled=True) for name, make in wanted.items()}
    bare = (clocks["bare"].milliseconds + clocks["bare again"].milliseconds) / 2
    rows = []
    for name, clock in clocks.items():
        more = clock.milliseconds - bare
        kernels = f"{clock.kernels - clocks['bare'].kernels:+d}" if clock.kernels else ""
        memory = (clock.peak - clocks["bare"].peak) / 2**20
        rows.append(
            (
                name,
                f"{clock.milliseconds:.2f}",
                f"{more:+.2f}",
                f"{100 * more / bare:+.1f} %",
                kernels,
                f"{memory:+.0f}",
            )
        )
    columns = ("", "ms per step", "ms more", "of the step", "kernels", "MiB more")
    return Result(case.title, columns, rows)


def robustness_table() -> Result:
    """Return the times of BIM with ten steps by the evaluator and by torchattacks."""
    batch, n = (256, 2048) if _ON_GPU else (8, 32)
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10).to(_DEVICE)
    patterns = torch.rand(10, 3, 4, 4, device=_DEVICE)
    labels = torch.randint(10, (n,), device=_DEVICE)
    images = nn.functional.interpolate(patterns[labels], size=32, mode="bilinear")
    images = (images + 0.2 * torch.randn_like(images)).clamp(0, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for k in range(40):
        first = 64 * k % n
        x, y = images[first:][:64], labels[first:][:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y, label_smoothing=0.2).backward()
        optimizer.step()
    net.eval()

    def ours(**options: Any) -> tuple[float, float]:
        settings = RobustnessSettings(attacks=["bim"], eps=8 / 255, step_size=2 / 255, steps=10, **options)
        evaluator = RobustnessEvaluator(net, InputSpace(None, None, normalized_data=False), settings, net)
        for k, (x, y) in enumerate(zip(images.split(batch), labels.split(batch), strict=True)):
            evaluator.put(x, y, range(k * batch, k * batch + len(y)))
        found = evaluator.finish()
        return tuple(float(found.of(name).correct.double().mean()) for name in ("clean", "bim"))  # type: ignore[return-value]

    def theirs() -> tuple[float, float]:
        import torchattacks

        attack, right = torchattacks.BIM(net, eps=8 / 255, alpha=2 / 255, steps=10), [0, 0]
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            for k, points in enumerate((x, attack(x, y))):
                with torch.no_grad():
                    right[k] += int((net(points).argmax(1) == y).sum())
        return right[0] / n, right[1] / n

    runs = {"torchattacks.BIM": theirs, "final": ours, "any": lambda: ours(semantics="any")}
    runs["final, bf16"] = lambda: ours(autocast="bf16")
    runs["final, bf16, verified"] = lambda: ours(autocast="bf16-verified")
    rows, slowest = [], None
    for name, run in runs.items():
        try:
            run()
        except ImportError:
            continue
        times = []
        for _ in range(3):
            _wait()
            began = time.perf_counter()
            clean, attacked = run()
            _wait()
            times.append(time.perf_counter() - began)
        slowest = slowest or min(times)
        rows.append((name, f"{min(times):.3f}", f"{slowest / min(times):.1f}", f"{clean:.4f}", f"{attacked:.4f}"))
    return Result(f"BIM, 10 steps, resnet18, {n} images of 32 px", ("", "s", "× as fast", "clean", "bim"), rows)


def _wait() -> None:
    """Wait until the device has done what is queued."""
    if _ON_GPU:
        torch.cuda.synchronize()


def machine() -> str:
    """Return the device and the versions."""
    name = torch.cuda.get_device_name() if _ON_GPU else "CPU, a rehearsal"
    return f"{name}, torch {torch.__version__}, Lightning {pl.__version__}"


def tested(arguments: list[str]) -> str:
    """Run tests, print what they say, and return their last line."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - arguments of this file
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    return last.strip("= ")


def main() -> None:
    """Run the tests and the benchmark, and print or write its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help=f"steps that are timed, in {_BLOCKS} blocks")
    parser.add_argument("--short", action="store_true", help="do not time each monitor alone")
    parser.add_argument("--without-tests", action="store_true", help="measure only")
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: make every table in small on the CPU")
    options = parser.parse_args()
    if not _ON_GPU:
        print("There is no CUDA device: only the tests that need none are run.")
        if not options.without_tests:
            print(tested(["-n0", *_EMULATED]))
        if not options.rehearse:
            return
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.backends.cudnn.benchmark = True
    outcome = ""
    if _ON_GPU and not options.without_tests:
        outcome = f"`pytest -m gpu`: {tested(['-m', 'gpu', '-n', '4', 'tests/gpu'])}.\n"
    results: list[Result] = []
    tables = [
        functools.partial(steps_table, case, options.rounds, options.short or k > 1)
        for k, case in enumerate(CASES if _ON_GPU else REHEARSED)
    ]
    for table in (*tables, robustness_table):
        results.append(table())
        results[-1].show(Console(width=120))
        if options.write:  # after each table: a lent machine may be taken away
            text = [f"{machine()}.\n", outcome, *(result.markdown() for result in results)]
            options.write.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
