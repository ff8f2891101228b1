"""Independent records of trainings in float64, and a logger that stores every layer.

The witness does not use the package: it copies weights and gradients in hooks of its own and sums over their elements.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from support.projects import Rows

_PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\.original\d*$")


def layer(name: str) -> str:
    """Return the name of a parameter's layer in the package's keys."""
    return _PARAMETRIZED.sub(r".\1", name).removesuffix("_orig").removesuffix(".weight")


@dataclass
class Moved:
    """One parameter in one optimizer step, before and after."""

    name: str
    optimizer: str
    lr: float
    before: Tensor
    gradient: Tensor
    after: Tensor

    @property
    def weight_sq(self) -> float:
        return float(self.before.square().sum())

    @property
    def increment(self) -> float:
        return float(((self.after - self.before) * (self.after + self.before)).sum())

    @property
    def predicted(self) -> float:
        return self.lr**2 * float(self.gradient.square().sum())

    @property
    def size(self) -> float:
        """Return the size of the largest part of the increment's sums, to which their rounding is relative."""
        update = self.after - self.before
        return float(2 * (self.before * update).abs().sum() + update.square().sum())

    @property
    def cosines(self) -> Tensor:
        """Return |cos(W, g)| of every output row, 0 if there is no gradient."""
        weight, gradient = self.before.flatten(1), self.gradient.flatten(1)
        lengths = weight.norm(dim=1) * gradient.norm(dim=1)
        return torch.where(lengths > 0, (weight * gradient).sum(1).abs() / lengths.clamp_min(1e-300), 0.0)


@dataclass
class Sums:
    """Sums of changes of ‖W‖² of a parameter, since an optimizer with this parameter first took a step."""

    start: float
    predicted: float = 0.0
    increment: float = 0.0
    size: float = 0.0
    now: float = 0.0
    explainable: bool = True
    """Whether every step evaluated its closure at most once."""


@dataclass
class Taken:
    """One optimizer step."""

    optimizer: Optimizer
    held: dict[nn.Parameter, tuple[Tensor, float]]
    gradients: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    evaluations: int = 0


class Witness(pl.Callback):
    """Records every optimizer step of a training; comes first in the list of callbacks."""

    def __init__(self) -> None:
        self.moved: dict[int, dict[str, Moved]] = defaultdict(dict)
        self.sums: dict[str, Sums] = {}
        self.history: dict[int, dict[str, Sums]] = {}
        self.several: dict[int, set[str]] = defaultdict(set)
        self.taken = 0
        self._called: dict[nn.Parameter, str] = {}
        self._hooked: set[int] = set()
        self._handles: list[Any] = []
        self._open: list[Taken] = []
        self._trainer: Any = None
        self._module: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._trainer, self._module = trainer, pl_module
        for optimizer in trainer.optimizers:
            if id(optimizer) not in self._hooked:
                self._hooked.add(id(optimizer))
                self._handles.append(optimizer.register_step_pre_hook(self._begins))
                self._handles.append(optimizer.register_step_post_hook(self._ends))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        named = dict(pl_module.named_parameters())
        for name, sums in self.sums.items():
            if name in named:
                sums.now = float(named[name].detach().square().sum())
        self.history[self._step] = {name: Sums(**vars(sums)) for name, sums in self.sums.items()}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._trainer = self._module = None

    @property
    def _step(self) -> int:
        """Return the step number that loggers get."""
        return int(self._trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if self._open and self._open[-1].optimizer is optimizer:
            raise AssertionError("no step inside a step of the same optimizer in these tests")
        held = {
            parameter: (parameter.detach().clone(), float(group.get("lr", torch.nan)))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        taken = Taken(optimizer, held)
        self._open.append(taken)
        self._account(held)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._keep_gradients(taken)
            return None

        def seen() -> Any:
            try:
                loss = closure()
            except Exception:
                self._open.remove(taken)  # no step
                raise
            taken.evaluations += 1
            if taken.evaluations == 1:
                self._keep_gradients(taken)
            return loss

        return (args[0], seen, *args[2:]) if len(args) > 1 else args, kwargs if len(args) > 1 else {"closure": seen}

    @staticmethod
    def _keep_gradients(taken: Taken) -> None:
        taken.gradients = {p: p.grad.detach().clone() for p in taken.held if p.grad is not None}

    def _account(self, held: Iterable[nn.Parameter]) -> None:
        names = {p: n for n, p in self._module.named_parameters()}
        for parameter in held:
            if parameter not in names:
                continue
            name, before = names[parameter], self._called.get(parameter)
            self._called[parameter] = name
            if before not in (None, name):  # pruned or parametrized since the last step
                self.sums[name] = self.sums.pop(before)
            elif name not in self.sums:
                self.sums[name] = Sums(float(parameter.detach().square().sum()))

    def _ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        taken = self._open.pop()
        assert taken.optimizer is optimizer
        self.taken += 1
        names = {p: n for n, p in self._module.named_parameters()}
        for parameter, gradient in taken.gradients.items():
            if parameter not in names:  # of a replaced layer
                continue
            name, (before, lr) = names[parameter], taken.held[parameter]
            moved = Moved(name, type(optimizer).__name__, lr, before, gradient, parameter.detach().clone())
            self.moved[self._step][name] = moved
            sums = self.sums[name]
            sums.predicted += moved.predicted
            sums.increment += moved.increment
            sums.size += moved.size
            if taken.evaluations > 1:
                sums.explainable = False
                self.several[self._step].add(name)


class Layers(Rows):
    """A logger that stores every layer: by step, metric and layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, dict[str, dict[str, float]]] = {}

    def log_layers(self, layers: dict[str, dict[str, float]], step: int | None = None) -> None:
        assert step not in self.layers
        self.layers[step or 0] = layers

    def by_layer(self, step: int, group: str) -> dict[str, dict[str, float]]:
        """Return the metrics of each layer of a group."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for key, values in self.layers[step].items():
            if key.startswith(f"{group}/"):
                for name, value in values.items():
                    found[name][key.removeprefix(f"{group}/")] = value
        return dict(found)


def is_weight(name: str, parameter: Tensor) -> bool:
    """Return whether the package measures a parameter: those with rows."""
    return parameter.ndim >= 2 and parameter.numel() > parameter.shape[0] and not name.endswith("original0")
