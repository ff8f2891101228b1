"""Steps on fake CUDA tensors: what they would launch and transfer is counted, and nothing is computed."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from pytorch_lightning.plugins import Precision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.callbacks._monitors import session as sessions
from lightning_normgeo.callbacks._readings.publication import transfer
from lightning_normgeo.callbacks._readings.publication.transfer import HostCopy
from lightning_normgeo.geometry.products import compiled
from lightning_normgeo.probes.batch_norm import forward_pass

_NO_KERNEL = {
    "device",
    "view",
    "_unsafe_view",
    "reshape",
    "detach",
    "alias",
    "t",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "as_strided",
    "unbind",
    "movedim",
    "_reshape_alias",
    "lift_fresh",
    "is_same_size",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "view_as_real",
    "narrow",
}
"""Operations that launch no kernel: views and allocations."""
_KERNELS = {"sort": 8, "cat": 128, "stack": 128}
"""Kernels of one sort; and the number of tensors that one kernel concatenates."""


class Counts(TorchDispatchMode):
    """Counts the kernels, and the copies between host and device, that the package launches, by line."""

    active: ClassVar[list[Counts]] = []

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()

    def __enter__(self) -> Counts:
        self.active.append(self)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: object) -> None:
        self.active.remove(self)
        super().__exit__(*error)

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
            if name not in _NO_KERNEL and "cuda" in before | after:
                self.kernels[where] += _launches(name, args)
        return out


def _launches(name: str, args: Any) -> int:
    if name in ("cat", "stack"):
        return -(-len(args[0]) // _KERNELS[name])
    return _KERNELS.get(name, 1)


def _where() -> str | None:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/").split("/")
        if "lightning_normgeo" in path[:-1] and path[-1] != "zero_constants.py":  # a mode, which the model goes through
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
        self.strategy, self.precision_plugin = SingleDeviceStrategy(torch.device("cuda")), Precision()
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))


def fake_kernels(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Let fake tensors go through the launches of the GPU kernels, and return their number by kernel."""
    launches = pytest.importorskip("lightning_normgeo.geometry.products.triton_launches", exc_type=ImportError)
    launched: Counter[str] = Counter()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        launched[name] += 1
        for counts in Counts.active:
            counts.kernels[f"geometry/products/triton_kernels.py:{name}"] += 1

    patch.setattr(compiled, "_TYPES", (*compiled._TYPES, FakeTensor))
    patch.setattr(compiled, "_WORTHWHILE", 0)
    patch.setattr(launches, "launch", launch)
    patch.setattr(launches, "address", lambda tensor: 0)
    patch.setattr(
        launches, "_sent", lambda values, device: torch.empty(values.shape, dtype=values.dtype, device=device)
    )
    return launched


def stub_transfer(patch: pytest.MonkeyPatch) -> list[int]:
    """Replace the copy to the host; return the list of the numbers of values that it would bring."""
    brought: list[int] = []

    class Copy(HostCopy):
        def __init__(self, values: torch.Tensor) -> None:
            assert values.device.type == "cuda"
            self.asynchronous = True
            brought.append(values.numel())

        def wait(self) -> list[float]:
            return [0.0] * brought[-1]  # no flag holds: an invalid step, of which nothing is made

    patch.setattr(transfer, "HostCopy", Copy)
    return brought


def join_monitors(run: Bare, module: Any, every: int = 1, cumulative: bool = False) -> None:
    """Let the three monitors join the session of a run."""
    for monitor in (
        OrthogonalityMonitor(every),
        NormGrowthMonitor(every, cumulative=cumulative),
        AffineConvergenceMonitor(every),
    ):
        monitor._cadence = every
        sessions.Session.of(run).join(monitor, run, module)


def take_step(run: Any, module: Any, optimizer: Any, pixels: int = 8) -> Counts:
    """Take a step as the Trainer does, with gradients that a backward pass on a device would leave."""
    session, counted = sessions.Session.of(run), Counts()
    with counted:
        session.batch_starts(run, module, None, 0)
        images = torch.empty(8, 3, pixels, pixels, device="cuda")
        loss = nn.functional.cross_entropy(module(images), torch.empty(8, dtype=torch.long, device="cuda"))
        optimizer.zero_grad()
        _hook(session, "on_before_backward", run, module, loss)
        for parameter in module.parameters():  # a backward pass of fake tensors needs a device
            parameter.grad = torch.empty_like(parameter, requires_grad=False)
        _call_hooks_of_nodes(session)
        _hook(session, "on_after_backward", run, module)
        optimizer.step()
        run.fit_loop.epoch_loop._batches_that_stepped += 1
        _hook(session, "on_train_batch_end", run, module, None, None, 0)
    return counted


def _hook(session: Any, name: str, *arguments: Any) -> None:
    hook = session.driver.__dict__.get(name)
    if hook is not None:
        hook(*arguments)


def _call_hooks_of_nodes(session: Any) -> None:
    """Call the backward hooks on the autograd nodes of batch normalizations, as a backward pass would."""
    probe = session.observer.batch_norms
    for name, passes in probe._passes.items():
        for one in passes:
            forward_pass._note_gradient(one, (None, torch.empty_like(probe.layers[name].weight)), ())
