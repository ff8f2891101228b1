"""Small foreign projects: LightningModules that know nothing of the package, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    """A classifier as anybody writes it."""

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
