"""Small user projects: LightningModules that do not know this package, their data, and recorders of training."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Optimizers = Callable[[nn.Module], Any]


def sgd(**settings: Any) -> Optimizers:
    return lambda module: torch.optim.SGD(module.parameters(), **{"lr": 0.1, **settings})


class ConvNet(nn.Sequential):
    """Two convolutions with batch normalization (invariant), and a linear layer (control)."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6, eps=eps),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8, eps=eps),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )


class Project(pl.LightningModule):
    """A classifier as users commonly write it."""

    def __init__(self, optimizers: Optimizers | None = None, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = ConvNet() if net is None else net
        self.optimizers_of = optimizers or sgd()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


def images(n: int = 64, batch_size: int = 8, dtype: torch.dtype = torch.float32, classes: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(n, 3, 8, 8, generator=generator, dtype=dtype)
    return DataLoader(TensorDataset(x, torch.randint(classes, (n,), generator=generator)), batch_size=batch_size)


class Resumed(DataLoader[Any]):
    """Eight batches, or the remaining ones after a restart: Lightning saves and restores a loader's state."""

    def __init__(self) -> None:
        super().__init__(images().dataset, batch_size=8)
        self.given = self.skipped = 0

    def __iter__(self) -> Any:
        skipped, self.skipped = self.skipped, 0
        self.given = skipped
        for batch in itertools.islice(super().__iter__(), skipped, None):
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["given"]


def trainer(*callbacks: Any, steps: int = 4, **settings: Any) -> pl.Trainer:
    defaults = {
        "max_steps": steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


class Rows(pl.loggers.Logger):
    """A logger that stores the rows of this package's metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith(("norm_growth", "orthogonality", "affine")) for key in metrics):
            self.rows.append((step or 0, dict(metrics)))

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows]

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """The same values by key."""
        found: dict[str, list[tuple[int, float]]] = {}
        for step, metrics in self.rows:
            for key, value in metrics.items():
                found.setdefault(key, []).append((step, value))
        return found


class Account(pl.Callback):
    """Slow reference of each batch's effect on the weights: copies before and after, in float64.

    With ``twin_of`` it also has the gradients that the optimizer should get: those of a copy of the model on the same
    batches, accumulated, averaged over ranks and clipped as set in the Trainer. It comes first among the callbacks.
    """

    def __init__(self, twin_of: Project | None = None) -> None:
        self.twin = None if twin_of is None else copy.deepcopy(twin_of.net)
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.rates: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        window = trainer.accumulate_grad_batches
        if batch_idx % window == 0:
            self._keep(pl_module)
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
            self.rates.append({n: rates[id(p)] for n, p in pl_module.named_parameters() if id(p) in rates})
        if self.twin is not None:
            self._backward(trainer, pl_module, batch, batch_idx % window == 0)
            if (batch_idx + 1) % window == 0 or batch_idx + 1 == trainer.num_training_batches:
                self.gradients.append(self._applied(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._keep(pl_module)

    def _keep(self, module: nn.Module) -> None:
        self.weights.append({n: p.detach().double().clone() for n, p in module.named_parameters()})

    def _backward(self, trainer: Any, module: Any, batch: Any, first: bool) -> None:
        self.twin.to(next(module.parameters()).dtype).load_state_dict(module.net.state_dict())
        if first:
            self.twin.zero_grad()
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(trainer.precision)
        with torch.random.fork_rng(), torch.autocast("cpu", half, enabled=half is not None):
            loss = nn.functional.cross_entropy(self.twin(batch[0]), batch[1]) / trainer.accumulate_grad_batches
        (loss * self._scale(trainer)).backward()

    def _applied(self, trainer: Any) -> dict[str, Tensor]:
        parameters = dict(self.twin.named_parameters())
        for parameter in parameters.values():
            parameter.grad.div_(self._scale(trainer))
            if trainer.world_size > 1:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad.div_(trainer.world_size)
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters.values(), trainer.gradient_clip_val)
        elif trainer.gradient_clip_val:
            nn.utils.clip_grad_norm_(parameters.values(), trainer.gradient_clip_val)
        return {f"net.{name}": parameter.grad.double().clone() for name, parameter in parameters.items()}

    @staticmethod
    def _scale(trainer: Any) -> float:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    def increments(self) -> list[dict[str, float]]:
        """‖W⁺‖² - ‖W‖² per step."""
        pairs = zip(self.weights, self.weights[1:], strict=False)
        return [{n: float(((b[n] - a[n]) * (b[n] + a[n])).sum()) for n in a} for a, b in pairs]

    def predictions(self) -> list[dict[str, float]]:
        """η²‖g‖² per step."""
        pairs = zip(self.rates, self.gradients, strict=True)
        return [
            {n: rates[n] ** 2 * float(g.square().sum()) for n, g in gradients.items()} for rates, gradients in pairs
        ]

    def cosines(self, step: int, name: str) -> Tensor:
        """|cos(W, g)| per output row."""
        weight, gradient = (kept[step][name].flatten(1) for kept in (self.weights, self.gradients))
        return (weight * gradient).sum(1).abs() / (weight.norm(dim=1) * gradient.norm(dim=1))


class Fingerprint(pl.Callback):
    """Records all state of a training after each batch, random numbers included."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        state = {
            "weights": pl_module.state_dict(),
            "gradients": {n: p.grad for n, p in pl_module.named_parameters()},
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "random": (torch.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002
            "scaler": None if scaler is None else scaler.state_dict(),
            "modes": {n: m.training for n, m in pl_module.named_modules()},
            "steps": trainer.global_step,
        }
        self.states.append(copy.deepcopy(state))


def same(a: Any, b: Any) -> bool:
    """Return whether two nested states are equal bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Lion(torch.optim.Optimizer):
    """Lion as published (Chen et al. 2023), which torch does not have."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        average = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
        beta1, beta2 = group["betas"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_((average * beta1 + parameter.grad * (1 - beta1)).sign(), alpha=-group["lr"])
        average.mul_(beta2).add_(parameter.grad, alpha=1 - beta2)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021): W moves along the gradient at W + e.

    ``ahead`` takes e from the previous step, so that the closure is evaluated once, when W has already moved.
    """

    def __init__(self, params: Any, lr: float = 0.1, rho: float = 0.1, ahead: bool = False) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "ahead": ahead})

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        closure = torch.enable_grad()(closure)
        (group,) = self.param_groups
        loss = None if group["ahead"] else closure()
        before = [parameter.clone() for parameter in group["params"]]
        for parameter in group["params"]:
            along = self.state[parameter].get("last", parameter) if group["ahead"] else parameter.grad
            parameter.add_(along, alpha=group["rho"])
        loss = closure() if loss is None else (closure(), loss)[1]
        for parameter, weight in zip(group["params"], before, strict=True):
            parameter.copy_(weight).add_(parameter.grad, alpha=-group["lr"])
            self.state[parameter]["last"] = parameter.grad.clone()
        return loss


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov-foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "nadam": partial(torch.optim.NAdam, lr=0.01, weight_decay=0.01),
    "radam": partial(torch.optim.RAdam, lr=0.01, weight_decay=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01, lr_decay=0.1, weight_decay=0.01),
    "adamax": partial(torch.optim.Adamax, lr=0.01, weight_decay=0.01),
    "lion": partial(Lion, lr=1e-3, weight_decay=0.1),
}
"""Every optimizer whose increments are explained; Lion after its registration."""
