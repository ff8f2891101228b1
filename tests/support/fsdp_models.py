"""Networks, and a LightningModule that shards them by fully_shard if there are several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

from support.projects import Optimizers, sgd, trainer

BATCH = 8
"""Samples per step of all processes together."""


class Zoo(nn.Module):
    """Units of every kind, in float64, normalized per sample, so that the batch may be distributed in any way."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.GroupNorm(3, 6), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(6, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.ReLU())
        self.up_filters = nn.Sequential(nn.ConvTranspose2d(4, 5, 2, bias=False), nn.InstanceNorm2d(5), nn.ReLU())
        self.lengths = weight_norm(nn.Conv2d(5, 5, 3, stride=2, bias=False))
        self.one_row = nn.Sequential(nn.Conv2d(5, 1, 3, bias=False), nn.InstanceNorm2d(1), nn.ReLU())
        self.joint = nn.Linear(36, 7)
        self.norm = nn.LayerNorm(7)
        self.matrix = spectral_norm(nn.Linear(7, 5))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(x)
        x = self.up_filters(self.up(x + 0.1 * x.relu()))
        x = self.norm(self.joint(self.one_row(self.lengths(x)).flatten(1)))
        return self.head(self.frozen(self.matrix(x)).relu())


class Branches(nn.Module):
    """Network in which each process uses a layer that the others do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(192, 6, bias=False), nn.LayerNorm(6))
        self.branches = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])
        self.rank = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[self.rank](self.stem(x))


class Attention(nn.Module):
    """Network that uses the weight of a layer without calling the layer, in a method other than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.norm = nn.Linear(192, 6, bias=False), nn.LayerNorm(6)
        self.heads = nn.MultiheadAttention(6, 2)
        self.out = nn.Linear(6, 4)

    def classify(self, x: Tensor) -> Tensor:
        x = self.norm(self.inputs(x.flatten(1)))
        return self.out(self.heads(x, x, x)[0])

    forward = classify


def batch_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip


def group_norms() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3), nn.GroupNorm(1, 8)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4))


def grouped() -> nn.Module:
    layers = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), nn.InstanceNorm2d(6), nn.Flatten(), nn.Linear(486, 4)
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.InstanceNorm2d(4), *layers)


def decaying(make: Any, **settings: Any) -> Any:
    """Return an optimizer whose learning rate changes after every step."""

    def configure(module: nn.Module) -> Any:
        optimizer = make([p for p in module.parameters() if p.requires_grad], **settings)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]

    return configure


class Unknown(torch.optim.Adadelta):
    """Optimizer that is not registered and has its own step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


SAME_AS_ONE: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (decaying(torch.optim.SGD, lr=0.1), {}),
    "momentum": (
        decaying(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "steps": 6},
    ),
    "adamw": (
        decaying(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value", "num_sanity_val_steps": 2},
    ),
    "without a formula": (decaying(Unknown, lr=1.0), {}),
    "adadelta": (decaying(torch.optim.Adadelta, lr=1.0), {}),
}
"""Optimizers and settings for which two processes have to give the results of one."""


class Divided(pl.LightningModule):
    """A classifier whose network is created and sharded in configure_model.

    Args:
        make: creates the network.
        parts: names of submodules that are sharded separately; a list of names is sharded as one.
        optimizers: creates the optimizers.
        settings: for fully_shard.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module] = Zoo,
        parts: Sequence[str | list[str]] = ("group", "up", "lengths", ["one_row", "norm"]),
        optimizers: Optimizers | None = None,
        dtype: torch.dtype = torch.float64,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.make, self.parts, self.dtype_of_data, self.settings = make, parts, dtype, settings
        self.optimizers_of = optimizers or sgd()
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = self.make().to(self.dtype_of_data)
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                self.divide(self.net)

    def divide(self, net: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        settings = {"mesh": self.device_mesh["data_parallel"], **self.settings}
        for part in self.parts:
            found = [net.get_submodule(name) for name in ([part] if isinstance(part, str) else part)]
            fully_shard(found[0] if isinstance(part, str) else found, **settings)
        fully_shard(net, **settings)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)

    def train_dataloader(self) -> Any:
        """Return this process's part of a global batch that is the same for any number of processes."""
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        x, y = samples(self.dtype_of_data)
        return DataLoader(TensorDataset(x[rank::ranks], y[rank::ranks]), batch_size=BATCH // ranks)


def samples(dtype: torch.dtype = torch.float64, n: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, 8, 8, generator=generator, dtype=dtype), torch.randint(4, (n,), generator=generator)


def divided_trainer(devices: int, *callbacks: Any, distributed_checkpoint: bool = True, **settings: Any) -> pl.Trainer:
    if devices > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=distributed_checkpoint
        )
        settings = {"strategy": strategy, "devices": devices, **settings}
    return trainer(*callbacks, use_distributed_sampler=False, **settings)
