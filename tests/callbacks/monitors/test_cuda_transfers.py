"""Host-device transfers of a measured step, counted on fake CUDA tensors, so that no GPU is needed."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.callbacks._monitors import session as sessions
from lightning_normgeo.callbacks._readings.readings import HostValues
from support.projects import ConvNet, Project


class Transfers(TorchDispatchMode):
    """Counts copies between host and device that the package makes, by the line that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        where = _where()
        if where is not None:
            before = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            after = {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
            if name == "_local_scalar_dense" and "cuda" in before:
                self.down[where] += 1
            elif name in ("_to_copy", "copy_", "lift_fresh"):
                self.up[where] += "cpu" in before and "cuda" in before | after
                self.down[where] += "cuda" in before and "cpu" in after
        return out


def _where() -> str | None:
    frame = sys._getframe(2)
    while frame is not None:
        if "lightning_normgeo" in frame.f_code.co_filename.replace("\\", "/").split("/")[:-1]:
            return f"{frame.f_code.co_filename.rpartition('lightning_normgeo/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Bare:
    """The attributes of a Trainer that a session reads."""

    def __init__(self, module: Any, optimizer: Any) -> None:
        self.world_size, self.global_rank, self.max_steps, self.max_epochs = 1, 0, -1, 1
        self.lightning_module, self.optimizers = module, [optimizer]
        self.loggers: list[Any] = []
        self.callbacks: list[Any] = []
        self.callback_metrics: dict[str, Any] = {}
        self.log_every_n_steps = self.accumulate_grad_batches = 1
        self.num_training_batches = 8
        self.gradient_clip_val = self.gradient_clip_algorithm = None
        self.fast_dev_run = False
        self.strategy = SimpleNamespace(root_device=torch.device("cuda"))
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))


OPTIMIZERS = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=1e-3, capturable=True),
}


@pytest.mark.parametrize("cumulative", [False, True], ids=["steps", "cumulative"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_transfer_down_and_none_up(kind: str, cumulative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[int] = []

    def transfer(readings: Any, valid: Any, chosen: Any) -> HostValues:
        parts = [part for reading in readings for part in (reading.total, reading.by_layer) if part is not None]
        flat = torch.cat([part.reshape(-1).to(torch.float64) for part in (*valid, *parts)])
        assert flat.device.type == "cuda"
        brought.append(flat.numel())
        return HostValues({}, {}, [])

    monkeypatch.setattr(sessions, "transfer", transfer)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with torch.device("cuda"):
            module = Project(net=ConvNet())
        optimizer = OPTIMIZERS[kind](module.parameters())
        if kind == "capturable":
            optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
        run = Bare(module, optimizer)
        counts = [_step(run, module, optimizer, cumulative, first=k == 0) for k in range(3)]
    assert len(brought) == 3
    assert counts[0].up, "what stays the same is built at the first step, and counted"
    assert counts[-1].up == Counter(), "built on the host"
    assert counts[-1].down == Counter(), "read one by one"


def _step(run: Any, module: Any, optimizer: Any, cumulative: bool, first: bool) -> Transfers:
    session = sessions.Session.of(run)
    if first:
        for monitor in (
            OrthogonalityMonitor(1),
            NormGrowthMonitor(1, cumulative=cumulative),
            AffineConvergenceMonitor(1),
        ):
            session.join(monitor, run, module)
    counted = Transfers()
    with counted:
        session.batch_starts(run, module, None, 0)
        hooks = session.driver.__dict__
        loss = nn.functional.cross_entropy(
            module(torch.empty(8, 3, 8, 8, device="cuda")), torch.empty(8, dtype=torch.long, device="cuda")
        )
        hooks["on_before_backward"](run, module, loss)
        optimizer.zero_grad()
        for parameter in module.parameters():  # a backward pass of fake tensors needs a device
            parameter.grad = torch.empty_like(parameter, requires_grad=False)
        hooks["on_after_backward"](run, module)
        optimizer.step()
        run.fit_loop.epoch_loop._batches_that_stepped += 1
        hooks["on_train_batch_end"](run, module, None, None, 0)
    return counted
