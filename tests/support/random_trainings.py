"""Random trainings in float64: networks, optimizers, loops, and changes during training.

Everything follows from a seed. No unit is dead, and the ε of normalizations is 1e-30: invariant weights are invariant
up to float64's rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import lion_pytorch
import pytorch_lightning as pl
import pytorch_optimizer
import timm.optim
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo.normalization.parametrizations import CenteredWeightNormalization
from support.own_optimizers import Quantized, SignOfRoot
from support.tensors import draw

EPS, WIDTH = 1e-30, 6
ACTIVATIONS = (nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus)
Rng = random.Random

# --- networks ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer, its normalization and an activation; in a residual branch or used twice if shapes allow."""

    def __init__(self, rng: Rng, inputs: int, image: bool) -> None:
        super().__init__()
        outputs = rng.choice([WIDTH, WIDTH, 2 * WIDTH])
        self.layer = layer(rng, inputs, outputs, image)
        self.norm, self.other = norm(rng, outputs, image), norm(rng, outputs, image)
        self.act = rng.choice(ACTIVATIONS)()
        square = inputs == outputs
        self.twice, self.residual = square and rng.random() < 0.3, square and rng.random() < 0.4
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.layer(x)))
        y = self.act(self.other(self.layer(y))) if self.twice else y
        return x + y if self.residual else y


def layer(rng: Rng, inputs: int, outputs: int, image: bool) -> nn.Module:
    bias = rng.random() < 0.5
    if image:
        groups = 2 if inputs % 2 == 0 and rng.random() < 0.3 else 1
        made: nn.Module = nn.Conv2d(inputs, outputs, rng.choice([1, 3]), padding="same", bias=bias, groups=groups)
    else:
        made = nn.Linear(inputs, outputs, bias=bias)
    kind = rng.random()
    if kind < 0.12:
        parametrizations.weight_norm(made)
    elif kind < 0.2 and made.weight[0].numel() > 2:
        register_parametrization(made, "weight", CenteredWeightNormalization())
    return made


def norm(rng: Rng, channels: int, image: bool) -> nn.Module:
    affine = rng.random() < 0.8
    made: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "bn": lambda: (nn.BatchNorm2d if image else nn.BatchNorm1d)(channels, eps=EPS, affine=affine),
        "gn": lambda: nn.GroupNorm(rng.choice([1, 2]), channels, eps=EPS, affine=affine),
        "ln": lambda: nn.GroupNorm(1, channels, eps=EPS) if image else nn.LayerNorm(channels, eps=EPS),
    }
    return made[rng.choice(["none", "bn", "bn", "gn", "ln"])]()


class Net(nn.Module):
    """Two to five layers on eight features or small images; ``spare`` is used but at first in no optimizer."""

    def __init__(self, rng: Rng) -> None:
        super().__init__()
        self.image, width, blocks = rng.random() < 0.35, 8, []
        if self.image:
            width = 2
        for _ in range(rng.randint(1, 3)):
            blocks.append(Block(rng, width, self.image))
            width = blocks[-1].outputs
        self.blocks = nn.ModuleList(blocks)
        self.spare, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 2, 2, 2) if self.image else x
        for block in self.blocks:
            x = block(x)
        x = x.mean((2, 3)) if self.image else x
        return self.head(x + self.spare(x).tanh())

    def layers(self) -> list[nn.Module]:
        return [block.layer for block in self.blocks] + [self.head]


# --- optimizers -------------------------------------------------------------------------------------------------------


def optimizer(rng: Rng, parameters: list[nn.Parameter], closures: bool) -> torch.optim.Optimizer:
    """Return an optimizer with random settings, half of them SGD."""
    lr, decay = rng.choice([0.1, 0.02, 3e-3]), rng.choice([0.0, 0.0, 0.1])
    if rng.random() < 0.4:
        momentum = rng.choice([0.0, 0.0, 0.5, 0.9])
        dampening = rng.choice([0.0, 0.0, 0.3])
        nesterov = momentum > 0 and dampening == 0 and rng.random() < 0.4
        flags = {"nesterov": nesterov, "foreach": rng.choice([None, True, False]), "maximize": rng.random() < 0.1}
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, dampening=dampening, weight_decay=decay, **flags)
    if closures and rng.random() < 0.15:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=rng.choice([1, 3]))
    small: dict[str, Any] = {"lr": min(lr, 0.02), "weight_decay": decay}
    made: list[Callable[[], torch.optim.Optimizer]] = [
        lambda: torch.optim.Adam(parameters, amsgrad=rng.random() < 0.3, **small),
        lambda: torch.optim.AdamW(parameters, foreach=rng.choice([None, True]), **small),
        lambda: torch.optim.AdamW(parameters, fused=True, **small),
        lambda: torch.optim.NAdam(parameters, decoupled_weight_decay=rng.random() < 0.5, **small),
        lambda: torch.optim.RAdam(parameters, betas=(0.9, 0.9), **small),
        lambda: torch.optim.RMSprop(parameters, momentum=rng.choice([0, 0.9]), centered=rng.random() < 0.5, **small),
        lambda: torch.optim.Adagrad(parameters, lr_decay=0.1, **small),
        lambda: torch.optim.Adamax(parameters, **small),
        lambda: torch.optim.Adadelta(parameters, lr=1.0, weight_decay=decay),
        lambda: torch.optim.Adafactor(parameters, **small),
        lambda: torch.optim.ASGD(parameters, t0=2, **small),
        lambda: lion_pytorch.Lion(parameters, **small),
        lambda: timm.optim.Lion(parameters, caution=True, **small),
        lambda: timm.optim.Lamb(parameters, **small),
        lambda: timm.optim.Lars(parameters, momentum=0.9, **small),
        lambda: timm.optim.AdamP(parameters, delta=0.5, **small),
        lambda: pytorch_optimizer.AdEMAMix(parameters, weight_decouple=True, **small),
        lambda: Quantized(parameters, lr=small["lr"]),
        lambda: SignOfRoot(parameters, lr=small["lr"]),
    ]
    return rng.choice(made)()


# --- trainings --------------------------------------------------------------------------------------------------------


class Training(pl.LightningModule):
    """One training by its seed; ``calm`` omits what a checkpoint does not restore."""

    def __init__(self, seed: int, calm: bool = False) -> None:
        super().__init__()
        rng = Rng(seed)
        torch.manual_seed(seed)
        self.seed, self.calm = seed, calm
        self.net = Net(rng).double()
        self.automatic_optimization = rng.random() < 0.5
        self.edits = rng.choice([0.0, 0.3, 0.5])
        self.closures = not self.automatic_optimization and rng.random() < 0.3
        self.skips = rng.choice([0.0, 0.0, 0.2])
        self.every = rng.choice([1, 1, 1, 2, 3])
        self.settings: dict[str, Any] = {}
        if self.automatic_optimization:
            self.settings["accumulate_grad_batches"] = rng.choice([1, 1, 2, 3])
            clip = rng.choice([None, None, "norm", "value"])
            if clip:
                self.settings |= {"gradient_clip_val": 0.02, "gradient_clip_algorithm": clip}
                self.skips = 0.0  # torch cannot clip without gradients
        self._design = rng.random()
        self._seen = 0
        self.log_of_edits: list[str] = []
        for parameter in self.net.parameters():
            parameter.requires_grad_(rng.random() > 0.07)
        self.net.head.weight.requires_grad_(True)

    @property
    def turned(self) -> bool:
        """Return whether gradients are clipped by value."""
        return self.settings.get("gradient_clip_algorithm") == "value"

    @property
    def waits(self) -> bool:
        """Return whether there are gradients that no step has used yet."""
        if self.automatic_optimization:
            batch = self.trainer.fit_loop.epoch_loop.batch_idx
            return bool(batch % self.trainer.accumulate_grad_batches)
        return any(p.grad is not None and bool(p.grad.any()) for p in self.parameters())

    def configure_optimizers(self) -> Any:
        rng = Rng(f"{self.seed} optimizers")
        count = 1 if self.automatic_optimization else rng.choice([1, 2, 3])
        parts: list[list[nn.Parameter]] = [[] for _ in range(count)]
        by_parameter = rng.random() < 0.3
        for name, module in self.net.named_modules():
            chosen = rng.randrange(count)
            for parameter in module.parameters(recurse=False):
                if not name.endswith("spare"):
                    parts[rng.randrange(count) if by_parameter else chosen].append(parameter)
        made = [optimizer(rng, part, self.closures) for part in parts if part]
        return made[0] if len(made) == 1 else made

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._seen = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        rng = Rng(f"{self.seed} edit {self._seen}")
        if rng.random() < self.edits:
            choices = CALM if self.calm else EDITS
            name = rng.choice(sorted(choices))
            if choices[name](self, rng):
                self.log_of_edits.append(f"{self._seen} {name}")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        rng = Rng(f"{self.seed} loop {self._seen}")
        if not self.automatic_optimization:
            self._by_hand(rng, batch)
            return None
        return None if rng.random() < self.skips else self._loss(batch)

    def _loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def _by_hand(self, rng: Rng, batch: Any) -> None:
        """Run several backward passes and some steps, a few of them with a closure."""
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        passes = rng.choice([1, 1, 2, 3])
        for part in zip(*(tensor.chunk(passes) for tensor in batch), strict=True):
            self.manual_backward(self._loss(part))
        for one in optimizers:
            for _ in range(rng.choice([1, 1, 1, 1, 2])):
                self._step(rng, one, batch)

    def _step(self, rng: Rng, one: Any, batch: Any) -> None:
        clears, evaluated = rng.random() < 0.7, rng.random() < 0.3

        def closure() -> Tensor:
            one.zero_grad(set_to_none=clears)
            loss = self._loss(batch)
            self.manual_backward(loss)
            return loss

        if rng.random() < self.skips:
            return
        if isinstance(one.optimizer, torch.optim.LBFGS) or (self.closures and evaluated):
            one.step(closure=closure)
        else:
            if rng.random() < 0.3:
                self.clip_gradients(one, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            one.step()
        one.zero_grad(set_to_none=clears)


def batches(seed: int, n: int) -> DataLoader[Any]:
    x, labels = draw(n * 12, 8, seed=seed), torch.arange(n * 12) % 3
    return DataLoader(TensorDataset(x, labels), batch_size=12)


# --- what is done to a training; each returns whether it could be done ------------------------------------------------


class Halved(nn.Module):
    """A parametrization that halves its weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _plain(training: Training) -> list[nn.Module]:
    layers = [one for one in training.net.layers() if isinstance(one, (nn.Linear, nn.Conv2d))]
    return [one for one in layers if not is_parametrized(one) and not hasattr(one, "weight_orig")]


def _renamable(training: Training) -> list[nn.Module]:
    """Return the layers whose weights may be renamed now; a step without a graph would not show a later renaming."""
    return [] if training.waits and training.skips else _plain(training)


def _groups(training: Training) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any]]]:
    for one in training.trainer.optimizers:
        if not isinstance(one, torch.optim.LBFGS):
            for group in one.param_groups:
                yield one, group


def freeze(training: Training, rng: Rng) -> bool:
    for parameter in rng.choice(list(training.net.blocks)).parameters():
        parameter.requires_grad_(False)
    return True


def thaw(training: Training, rng: Rng) -> bool:
    for parameter in training.net.parameters():
        parameter.requires_grad_(True)
    return True


def change_rate(training: Training, rng: Rng) -> bool:
    for _, group in _groups(training):
        group["lr"] *= rng.choice([0.0, 0.5, 0.9]) if group["lr"] else 1.0
    return True


def change_momentum(training: Training, rng: Rng) -> bool:
    for one, group in _groups(training):
        if isinstance(one, torch.optim.SGD) and not group["nesterov"]:
            group["momentum"] = rng.choice([0.0, 0.5, 0.9])
        elif isinstance(one, (torch.optim.Adam, torch.optim.Adamax)):
            group["betas"] = rng.choice([0.5, 0.8]), rng.choice([0.9, 0.99])
    return True


def change_decay(training: Training, rng: Rng) -> bool:
    for _, group in _groups(training):
        if "weight_decay" in group:
            group["weight_decay"] = rng.choice([0.0, 0.05])
    return True


def join(training: Training, rng: Rng) -> bool:
    held = {p for one in training.trainer.optimizers for group in one.param_groups for p in group["params"]}
    late = list(training.net.spare.parameters())
    able = [one for one, _ in _groups(training)]
    if not able or held.intersection(late):
        return False
    rng.choice(able).add_param_group({"params": late})
    return True


def prune_some(training: Training, rng: Rng) -> bool:
    plain = _renamable(training)
    if plain:
        chosen = rng.choice(plain)
        mask = (
            torch.rand(chosen.weight.shape, generator=torch.Generator().manual_seed(rng.randrange(99))) > 0.2
        ).double()
        prune.custom_from_mask(chosen, "weight", mask)
    return bool(plain)


def parametrize(training: Training, rng: Rng) -> bool:
    plain = _renamable(training)
    if plain:
        register_parametrization(rng.choice(plain), "weight", Halved())
    return bool(plain)


def replace(training: Training, rng: Rng) -> bool:
    """Replace a layer; its parameters join the same optimizer, without gradients."""
    block = rng.choice(list(training.net.blocks))
    old = block.layer
    holders = [one for one, group in _groups(training) if any(p is old.weight for p in group["params"])]
    if old not in _plain(training) or training.waits or not holders:
        return False
    made = (
        nn.Linear(old.in_features, old.out_features)
        if isinstance(old, nn.Linear)
        else nn.Conv2d(old.in_channels, old.out_channels, 1, bias=False)
    )
    block.layer = made.double()
    holders[0].add_param_group({"params": list(made.parameters())})
    return True


def shrink(training: Training, rng: Rng) -> bool:
    """Change a weight outside of a step, unless a pending gradient exists: it was orthogonal to the old weight."""
    if training.waits:
        return False
    next(rng.choice(training.net.layers()).parameters()).data.mul_(0.9)
    return True


CALM: dict[str, Callable[[Training, Rng], bool]] = {
    "rate": change_rate,
    "momentum": change_momentum,
    "decay": change_decay,
    "shrink": shrink,
}
EDITS = CALM | {
    "freeze": freeze,
    "thaw": thaw,
    "join": join,
    "prune": prune_some,
    "parametrize": parametrize,
    "replace": replace,
}
