"""Scenarios of tests/support/fsdp_training.py for two processes that have no equivalent on one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.probes.sharded import all_reduce
from lightning_normgeo.probes.sharded.reader import ShardedReader
from support.fsdp_models import (
    SAME_AS_ONE,
    Attention,
    Branches,
    Divided,
    batch_norms,
    divided_trainer,
    group_norms,
    grouped,
)
from support.projects import Rows, same, sgd

Report = dict[str, Any]


class Collectives(TorchDispatchMode):
    """Counts every collective of this process, by torch.distributed or by DTensors, up to the end of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # its local tensors are dispatched again
        self.count += func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__
        return func(*args, **(kwargs or {}))


class Counting(pl.Callback):
    """Records the collectives of each batch, and the calls of all_reduce among them."""

    def __init__(self) -> None:
        self.mode = Collectives()
        self.calls = 0
        self.batches: list[tuple[int, int]] = []

    def fit(self, run: pl.Trainer, module: Any) -> Counting:
        genuine = torch.distributed.all_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return genuine(*args, **kwargs)

        torch.distributed.all_reduce = counted
        try:
            with self.mode:
                run.fit(module)
        finally:
            torch.distributed.all_reduce = genuine
        return self

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches.append((self.mode.count, self.calls))


class State(pl.Callback):
    """Records weights, gradients, optimizer state, buffers and random numbers of this process after each step."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        def local(tensor: Any) -> Any:
            part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            return part.detach().clone() if isinstance(part, torch.Tensor) else part

        moved = [(o, p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
        state = [{k: local(v) for k, v in o.state.get(p, {}).items()} for o, p in moved]
        tensors = [local(t) for _, p in moved for t in (p, p.grad)] + [local(t) for t in pl_module.buffers()]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.states.append((state, tensors, torch.get_rng_state(), scaler and scaler.state_dict()))


def collectives(devices: int) -> Report:
    """Compare runs that are measured at every second step with one that is not measured."""
    every = {
        "bare": [],
        "observed": [OrthogonalityMonitor(2), NormGrowthMonitor(2), AffineConvergenceMonitor(2)],
        "cumulative": [NormGrowthMonitor(2, cumulative=True)],
        "statistics": [AffineConvergenceMonitor(2)],
    }
    found = {}
    for name, monitors in every.items():
        counting = Counting()
        run = divided_trainer(devices, *monitors, counting, accumulate_grad_batches=2, gradient_clip_val=0.1)
        found[name] = counting.fit(run, Divided(batch_norms, ["0", "1"])).batches
    return found


def unchanged(devices: int) -> Report:
    """Train in float32 with batch normalization, with and without monitors, and compare the whole state."""

    def states(*monitors: Any, logger: Any = False) -> list[Any]:
        state = State()
        optimizers = sgd(momentum=0.9, weight_decay=1e-3)
        module = Divided(batch_norms, ["0", "1", "4"], optimizers, dtype=torch.float32)
        divided_trainer(devices, *monitors, state, steps=6, logger=logger).fit(module)
        return state.states

    rows = Rows()
    monitors = OrthogonalityMonitor(), NormGrowthMonitor(cumulative=True), AffineConvergenceMonitor()
    return {"same": same(states(), states(*monitors, logger=rows)), "rows": rows.rows}


def mixed_precision(devices: int) -> Report:
    """Compute in bfloat16 with float32 weights."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    rows = Rows()
    module = Divided(group_norms, ["0"], dtype=torch.float32, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    divided_trainer(devices, OrthogonalityMonitor(), NormGrowthMonitor(), logger=rows).fit(module)
    return {"rows": rows.rows}


def replicated(devices: int) -> Report:
    """Train several copies of the model, each sharded over some of the processes (HSDP)."""
    found = {}
    for name, shape in {"copies": (devices, 1), "parts": (1, devices)}.items():
        rows, module = Rows(), Divided(optimizers=SAME_AS_ONE["sgd"][0])

        def divide(net: nn.Module, module: Divided = module, shape: tuple[int, int] = shape) -> None:
            mesh = torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=("copy", "part"))
            module.settings["mesh"] = mesh
            Divided.divide(module, net)

        module.divide = divide
        monitors = OrthogonalityMonitor(layers="*"), NormGrowthMonitor(layers="*")
        divided_trainer(devices, *monitors, logger=rows).fit(module)
        found[name] = rows.rows
    return found


def found_by(devices: int) -> Report:
    """Find the units of a network from the graph for every way of calling it."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    found = {}
    for name in ("forward", "classify"):
        rows, module = Rows(), Divided(Attention, [] if name == "classify" else ["heads"])

        def step(batch: Any, batch_idx: int, module: Divided = module, name: str = name) -> Any:
            net: Any = module.net if name == "forward" else module.net.classify  # type: ignore[union-attr]
            return nn.functional.cross_entropy(net(batch[0]), batch[1])

        module.training_step = step  # type: ignore[method-assign]
        module.on_fit_start = lambda net=module: register_fsdp_forward_method(net.net, "classify")  # type: ignore[method-assign]
        divided_trainer(devices, NormGrowthMonitor(layers="*"), logger=rows).fit(module)
        found[name] = sorted(key for key in rows.rows[-1][1] if "/weight_norm/" in key)
    return found


def batch_statistics(devices: int) -> Report:
    """Compare γ, β, σ and μ with those that a hook of the test records on this process."""
    rows, module, seen = Rows(), Divided(batch_norms, ["0", "1"], dtype=torch.float64), []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for name in ("1", "4"):
                pl_module.net.get_submodule(name).register_forward_pre_hook(self.note)

        def note(self, layer: Any, args: Any) -> None:
            variance, mean = torch.var_mean(args[0], (0, 2, 3), correction=0)
            weight, bias = layer.weight.detach(), layer.bias.detach()
            seen.append([(weight**2 - variance).abs().mean().item(), (bias - mean).abs().mean().item()])

    divided_trainer(devices, AffineConvergenceMonitor(layers="*"), Watch(), logger=rows).fit(module)
    keys = ("affine/abs_gamma2_minus_sigma2_mean", "affine/abs_beta_minus_mu_mean")
    found = [[row[f"{key}/net.{layer}"] for key in keys] for _, row in rows.rows for layer in ("1", "4")]
    return {"found": found, "seen": seen}


def failing_on_the_second_call(function: Any) -> Any:
    """Return a function that fails once, on one of the processes."""
    calls = itertools.count(1)

    def wrapped(*args: Any) -> Any:
        if next(calls) == 2 and torch.distributed.get_rank() == 1:
            raise MemoryError("just here")
        return function(*args)

    return wrapped


def left_out(devices: int) -> Report:
    """Train models that cannot be measured on every process; no process may wait for another."""
    found = {}

    def run(name: str, module: Divided, *callbacks: Any, **settings: Any) -> None:
        rows, monitor = Rows(), NormGrowthMonitor(layers="*")
        divided_trainer(devices, monitor, *callbacks, logger=rows, **settings).fit(module)
        layers = [sorted(key for key in row if "/weight_norm/" in key) for _, row in rows.rows]
        found[name] = {"layers": layers, "left_out": dict(monitor.left_out)}

    def branches() -> nn.Module:
        net = Branches()
        net.rank = torch.distributed.get_rank()
        return net

    module = Divided(branches, [])
    divide = module.divide
    module.divide = lambda net: (divide(net), net.set_reduce_scatter_unused_params(True))  # type: ignore[method-assign]
    run("branches", module)
    run("grouped", Divided(grouped, []))
    for name, owner, function in (("reading", ShardedReader, "read"), ("sending", all_reduce, "_write")):
        genuine = getattr(owner, function)
        setattr(owner, function, failing_on_the_second_call(genuine))
        run(name, Divided(batch_norms, []))
        setattr(owner, function, genuine)

    def first_gradient(trainer: Any) -> torch.Tensor:
        return trainer.optimizers[0].param_groups[0]["params"][0].grad.to_local()

    class Spoil(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2 and trainer.global_rank == 0:
                first_gradient(trainer).fill_(torch.nan)

    class Overflow(pl.Callback):
        def on_after_backward(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2 and trainer.global_rank == 1:
                first_gradient(trainer).fill_(torch.inf)

    run("not finite", Divided(batch_norms, []), Spoil())
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    run("skipped", Divided(group_norms, [], dtype=torch.float32), Overflow(), plugins=[scaler])
    return found


def edited(devices: int) -> Report:
    """Change weights after the second backward pass through ``.data``, on the process that has the last rows alone."""

    class Edit(pl.Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 1:
                for parameter in pl_module.parameters():
                    parameter.data.to_local().add_(0.01 * trainer.global_rank)

    rows, monitor = Rows(), OrthogonalityMonitor(1, layers="*")
    run = divided_trainer(devices, monitor, Edit(), logger=rows)
    run.fit(Divided(optimizers=SAME_AS_ONE["momentum"][0]))
    prefix = "orthogonality/rms_cos/"
    found = [sorted(key.removeprefix(prefix) for key in row if key.startswith(prefix)) for _, row in rows.rows]
    return {"cosines": found, "left_out": dict(monitor.left_out)}


ALL = (collectives, unchanged, mixed_precision, replicated, batch_statistics, found_by, left_out, edited)
