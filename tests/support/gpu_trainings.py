"""Trainings of a small network on a CUDA device, or on a CPU, in every setting whose kernels differ on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from support.gpu import DEVICE, ON_GPU
from support.projects import Optimizers, Project, Rows, trainer


class SmallNet(nn.Module):
    """A unit of every kind: filters, depthwise ones, a group, a transposed convolution, a layer, and a control."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.filters, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depthwise, self.norm2 = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.grouped, self.norm3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(4, 2 * width)
        self.transposed, self.norm4 = nn.ConvTranspose2d(2 * width, width, 2, stride=2), nn.BatchNorm2d(width)
        self.layer, self.norm5 = nn.Linear(width, 32), nn.LayerNorm(32)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in (
            (self.filters, self.norm),
            (self.depthwise, self.norm2),
            (self.grouped, self.norm3),
            (self.transposed, self.norm4),
        ):
            x = torch.relu(norm(layer(x)))
        return self.head(self.dropout(torch.relu(self.norm5(self.layer(x.mean((2, 3)))))))


def sgd(**options: Any) -> Optimizers:
    return lambda m: torch.optim.SGD(m.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, **options})


def adamw(tensor_lr: bool = False, **options: Any) -> Optimizers:
    def make(module: nn.Module) -> torch.optim.Optimizer:
        lr = torch.tensor(1e-3, device=DEVICE) if tensor_lr else 1e-3
        return torch.optim.AdamW(module.parameters(), lr=lr, **options)

    return make


@dataclass
class Setting:
    """How a network is trained."""

    optimizers: Optimizers = field(default_factory=sgd)
    trainer: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None
    compile: str | None = None
    channels_last: bool = False
    tf32: bool = False
    cumulative: bool = False


SETTINGS = {
    "sgd": Setting(),
    "sgd foreach": Setting(sgd(foreach=True)),
    "sgd fused": Setting(sgd(fused=True)),
    "tf32": Setting(tf32=True),
    "adamw foreach": Setting(adamw(foreach=True)),
    "adamw fused": Setting(adamw(fused=True)),
    "adamw fused, lr a tensor": Setting(adamw(tensor_lr=True, fused=True)),
    "adamw capturable, lr a tensor": Setting(
        adamw(tensor_lr=True, capturable=DEVICE == "cuda", foreach=DEVICE == "cuda")
    ),
    "bf16": Setting(trainer={"precision": "bf16-mixed"}),
    "bf16, adamw fused": Setting(adamw(fused=True), {"precision": "bf16-mixed"}),
    "fp16": Setting(sgd(foreach=True, fused=False), scale=1024.0),
    "fp16, adamw fused unscales": Setting(adamw(fused=True), scale=1024.0),
    "fp16, first steps overflow": Setting(sgd(fused=False), scale=2.0**19),
    "fp16, adamw fused, first steps overflow": Setting(adamw(fused=True), scale=2.0**19),
    "clip": Setting(trainer={"gradient_clip_val": 0.05}),
    "accumulate": Setting(trainer={"accumulate_grad_batches": 2}),
    "channels_last": Setting(channels_last=True),
    "cumulative": Setting(cumulative=True),
    "compile": Setting(compile="default"),
    "CUDA graphs": Setting(compile="reduce-overhead"),
}


class Layers(Rows):
    """Logger that stores the values of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, dict[str, dict[str, float]]] = {}

    def log_layers(self, layers: Any, step: int | None = None) -> None:
        self.layers[step or 0] = {key: dict(values) for key, values in layers.items()}


class Before(pl.Callback):
    """Slow account of each batch in float64: ‖W⁺‖² - ‖W‖² and ‖W‖² of each parameter."""

    def __init__(self) -> None:
        self.increments: dict[int, dict[str, tuple[float, float]]] = {}
        self._weights: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._weights = {name: p.detach().double().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        found = {}
        for name, parameter in pl_module.named_parameters():
            before, after = self._weights[name], parameter.detach().double()
            found[name.replace("_orig_mod.", "")] = (
                float(((after - before) * (after + before)).sum()),
                float(before.square().sum()),
            )
        self.increments[trainer.fit_loop.epoch_loop._batches_that_stepped] = found


@dataclass
class Trained:
    """A finished training: its whole state, and what was logged."""

    state: dict[str, Any]
    logger: Layers
    account: Before
    left_out: dict[str, int]
    steps: int


def train(setting: Setting, callbacks: list[Any], steps: int = 6, account: bool = False, net: Any = None) -> Trained:
    """Train the small network; ``callbacks`` observe it, an account does so if asked for."""
    pl.seed_everything(3, verbose=False)
    project = Project(setting.optimizers, SmallNet() if net is None else net)
    memory = torch.channels_last if setting.channels_last else torch.contiguous_format
    project.net = project.net.to(memory_format=memory)
    if setting.compile:
        torch._dynamo.reset()
        project.net = torch.compile(project.net, mode=setting.compile)  # type: ignore[assignment]
    settings, logger, before = dict(setting.trainer), Layers(), Before()
    if setting.scale is not None:
        scaler = torch.amp.GradScaler(DEVICE, init_scale=setting.scale, growth_interval=1000)
        settings["plugins"] = [MixedPrecision("16-mixed", DEVICE, scaler)]
    generator = torch.Generator().manual_seed(5)
    n = 16 * steps * settings.get("accumulate_grad_batches", 1)
    x = torch.rand(n, 3, 16, 16, generator=generator).contiguous(memory_format=memory)
    data = DataLoader(TensorDataset(x, torch.randint(10, (n,), generator=generator)), 16)
    with _numerics(setting.tf32):
        fit = trainer(
            *([before] if account else []),
            *callbacks,
            steps=steps,
            accelerator=DEVICE,
            devices=1,
            logger=logger if callbacks else False,
            **settings,
        )
        fit.fit(project, data)
    left_out = dict(getattr(callbacks[0], "left_out", {})) if callbacks else {}
    return Trained(_state(project), logger, before, left_out, fit.global_step)


@contextmanager
def _numerics(tf32: bool) -> Iterator[None]:
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    old = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = tf32
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        for backend, value in zip(backends, old, strict=True):
            backend.allow_tf32 = value


def _state(project: Any) -> dict[str, Any]:
    optimizer = project.optimizers().optimizer
    return copy.deepcopy(
        {
            "weights": {name.replace("_orig_mod.", ""): value for name, value in project.state_dict().items()},
            "gradients": [parameter.grad for parameter in project.parameters()],
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random on the device": torch.cuda.get_rng_state() if ON_GPU else None,
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in project.modules()),
        }
    )
